"""unCLIP's prior: from a caption to an image embedding of CLIP (Ramesh et al. 2022, section 2.2, arXiv:2204.06125).

Parameter names are those of diffusers. Letters: B batch, E size of an embedding, M text tokens, L = M + 4 tokens, D
width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_cli.core.compiling import Region
from ldm_cli.core.condition import Condition
from ldm_cli.core.models.attention import GELU, Attention, FeedForward, attend
from ldm_cli.core.models.checkpointing import Checkpointable, Checkpointed
from ldm_cli.core.models.layers import TimestepEmbedding, timestep_embedding
from ldm_cli.core.models.prior_transformer_config import PriorTransformerConfig


class PriorTransformer(Checkpointable, Checkpointed):
    """Predicts the image embedding, normalised, from a noisy one, a time and a caption.

    `clip_mean` and `clip_std`, [1, E], are measured and not trained: z = (embedding − clip_mean) / clip_std is what is
    noised and predicted. They begin as 0 and 1.
    """

    config_class = PriorTransformerConfig

    def __init__(self, config: PriorTransformerConfig) -> None:
        super().__init__()
        self.config = config
        dim, size = config.width, config.embedding_dim
        self.time_embedding = TimestepEmbedding(dim, dim)
        self.proj_in = nn.Linear(size, dim)
        self.embedding_proj = nn.Linear(size, dim)
        self.encoder_hidden_states_proj = nn.Linear(size, dim)
        length = config.num_embeddings + config.additional_embeddings
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(1, length, dim))
        self.prd_embedding = nn.Parameter(0.01 * torch.randn(1, 1, dim))
        self.transformer_blocks = nn.ModuleList(
            PriorBlock(dim, config.num_attention_heads) for _ in range(config.num_layers)
        )
        self.norm_out = nn.LayerNorm(dim)
        self.proj_to_clip_embeddings = nn.Linear(dim, size)
        self.clip_mean = nn.Parameter(torch.zeros(1, size), requires_grad=False)
        self.clip_std = nn.Parameter(torch.ones(1, size), requires_grad=False)

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The prediction for a noisy embedding: a `Denoiser`.

        Args:
            x: [B, E], normalised and noised.
            t: float [B] or [1], in units of training steps.
            condition: `tokens` [B, M, E], text states; `pooled` [B, E], the text embedding, not normalised; `mask`
                [B, M], 1 for the tokens of the caption, 0 for padding.

        Returns:
            z, [B, E].

        Raises:
            ValueError: a condition is missing.
        """
        tokens, pooled, mask = condition.tokens, condition.pooled, condition.mask
        if tokens is None or pooled is None or mask is None:
            raise ValueError("condition: the prior needs tokens, pooled and mask")
        waves = timestep_embedding(t, self.config.width, flip_sin_to_cos=True, freq_shift=0).to(x.dtype)
        added = [
            self.embedding_proj(pooled.to(x.dtype)),
            self.time_embedding(waves).expand(len(x), -1),
            self.proj_in(x),
            self.prd_embedding[0].to(x.dtype).expand(len(x), -1),
        ]
        hidden = torch.cat([self.encoder_hidden_states_proj(tokens), torch.stack(added, dim=1)], dim=1)
        hidden = hidden + self.positional_embedding.to(x.dtype)
        added_mask = _attention_mask(F.pad(mask, (0, len(added)), value=1.0)).to(x.dtype)
        for block in self.transformer_blocks:
            hidden = self.run(block, hidden, added_mask)
        answer: Tensor = self.proj_to_clip_embeddings(self.norm_out(hidden[:, -1]))
        return answer


class PriorBlock(Region):
    """Causal self-attention and feed-forward, each after a layer norm and added to its input."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, None, num_heads, bias=True)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim, GELU)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B, L, D], and what is added to the logits of attention, [B, 1, L, L] → [B, L, D]."""
        attention, tokens = self.attn1, self.norm1(x)
        query, key, value = attention.to_q(tokens), attention.to_k(tokens), attention.to_v(tokens)
        x = attention.to_out[0](attend(query, key, value, attention.num_heads, mask=mask)) + x
        hidden: Tensor = self.ff(self.norm3(x)) + x
        return hidden


def _attention_mask(mask: Tensor) -> Tensor:
    """What is added to the logits of attention: 0 where token i sees token j, [B, 1, L, L].

    −10,000 for padding and as much for j > i, both of which add up, as in diffusers.

    Args:
        mask: [B, L], 1 for tokens that may be seen.
    """
    length = mask.shape[1]
    above = torch.ones(length, length, dtype=mask.dtype, device=mask.device).triu(1)
    return -10000.0 * ((1.0 - mask)[:, None, None] + above)
