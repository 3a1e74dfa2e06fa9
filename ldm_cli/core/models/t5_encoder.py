"""T5's encoder, version 1.1 (Raffel et al. 2020, arXiv:1910.10683; Shazeer 2020, arXiv:2002.05202).

Parameter names are those of transformers. Letters: B batch, L tokens, D width, H heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_cli.core.compiling import Region
from ldm_cli.core.models.checkpointing import Checkpointable, Checkpointed
from ldm_cli.core.models.t5_encoder_config import T5EncoderConfig


class T5EncoderModel(Checkpointable):
    """Token ids to states.

    Initialised as transformers does: normal, with deviations by which the products keep their variance.
    """

    config_class = T5EncoderConfig

    def __init__(self, config: T5EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = _Stack(config)

    def forward(self, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Run the encoder.

        Args:
            input_ids: int64 [B, L].
            mask: bool [B, L], False for tokens that none attends to; None: all are attended to, padding as well, as
                Stable Diffusion 3 does.

        Returns:
            [B, L, D], after the final norm.
        """
        states: Tensor = self.encoder(self.shared(input_ids), mask)
        return states


class _Stack(Checkpointed):
    def __init__(self, config: T5EncoderConfig) -> None:
        super().__init__()
        self.block = nn.ModuleList(_Block(config, has_bias=i == 0) for i in range(config.num_layers))
        self.final_layer_norm = nn.RMSNorm(config.d_model, eps=config.layer_norm_epsilon)

    def forward(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """[B, L, D] and bool [B, L] → [B, L, D]."""
        first = self.block.get_submodule("0.layer.0.SelfAttention")
        assert isinstance(first, T5Attention)
        bias = first.bias(states.shape[1], states.device).to(states.dtype)
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None, None], -math.inf)
        for block in self.block:
            states = self.run(block, states, bias)
        normed: Tensor = self.final_layer_norm(states)
        return normed


class _Block(Region):
    def __init__(self, config: T5EncoderConfig, *, has_bias: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([_AttentionLayer(config, has_bias=has_bias), _FeedForwardLayer(config)])

    def forward(self, states: Tensor, bias: Tensor) -> Tensor:
        """[B, L, D] and the bias [1 or B, H, L, L] → [B, L, D]."""
        attended: Tensor = self.layer[1](self.layer[0](states, bias))
        return attended


class _AttentionLayer(nn.Module):
    def __init__(self, config: T5EncoderConfig, *, has_bias: bool) -> None:
        super().__init__()
        self.SelfAttention = T5Attention(config, has_bias=has_bias)
        self.layer_norm = nn.RMSNorm(config.d_model, eps=config.layer_norm_epsilon)

    def forward(self, states: Tensor, bias: Tensor) -> Tensor:
        """[B, L, D] and the bias [1 or B, H, L, L] → [B, L, D]."""
        attended: Tensor = self.SelfAttention(self.layer_norm(states), bias)
        return states + attended


class T5Attention(nn.Module):
    """Self-attention without biases and without the scale 1/√d, which the initial weights hold.

    Args:
        has_bias: whether the layer has the table of relative positions, whose values all layers share.
    """

    def __init__(self, config: T5EncoderConfig, *, has_bias: bool) -> None:
        super().__init__()
        self.config, inner = config, config.num_heads * config.d_kv
        self.q, self.k, self.v = (nn.Linear(config.d_model, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, config.d_model, bias=False)
        nn.init.normal_(self.q.weight, std=(config.d_model * config.d_kv) ** -0.5)
        for layer in (self.k, self.v):
            nn.init.normal_(layer.weight, std=config.d_model**-0.5)
        nn.init.normal_(self.o.weight, std=inner**-0.5)
        if has_bias:
            self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)
            nn.init.normal_(self.relative_attention_bias.weight, std=config.d_model**-0.5)

    def forward(self, states: Tensor, bias: Tensor) -> Tensor:
        """[B, L, D] and the bias [1 or B, H, L, L] → [B, L, D]."""
        q, k, v = (
            layer(states).unflatten(2, (self.config.num_heads, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        projected: Tensor = self.o(attended.transpose(1, 2).flatten(2))
        return projected

    def bias(self, length: int, device: torch.device) -> Tensor:
        """What is added to the products of queries and keys: [1, H, L, L]."""
        positions = torch.arange(length, device=device)
        buckets = relative_position_buckets(
            positions[None] - positions[:, None],
            self.config.relative_attention_num_buckets,
            self.config.relative_attention_max_distance,
        )
        bias: Tensor = self.relative_attention_bias(buckets).permute(2, 0, 1)[None]
        return bias


def relative_position_buckets(offsets: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """The row of the table for each offset of a key from its query: int64, of the same shape.

    Half of the rows are for keys that come later. Half of those are for the distances 0, 1, 2, …; the others for ranges
    that grow geometrically up to `max_distance` (Raffel et al. 2020, section 2.1).
    """
    half, exact = num_buckets // 2, num_buckets // 4
    distance = offsets.abs()
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, far) + (offsets > 0) * half


class _FeedForwardLayer(nn.Module):
    def __init__(self, config: T5EncoderConfig) -> None:
        super().__init__()
        self.DenseReluDense = GatedGELU(config.d_model, config.d_ff)
        self.layer_norm = nn.RMSNorm(config.d_model, eps=config.layer_norm_epsilon)

    def forward(self, states: Tensor) -> Tensor:
        """[B, L, D] → [B, L, D]."""
        hidden: Tensor = self.DenseReluDense(self.layer_norm(states))
        return states + hidden


class GatedGELU(nn.Module):
    """wo(gelu(wi_0 x) · wi_1 x), with GELU's tanh form (Shazeer 2020, eq. 6)."""

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(dim, inner_dim, bias=False)
        self.wi_1 = nn.Linear(dim, inner_dim, bias=False)
        self.wo = nn.Linear(inner_dim, dim, bias=False)
        for layer in (self.wi_0, self.wi_1):
            nn.init.normal_(layer.weight, std=dim**-0.5)
        nn.init.normal_(self.wo.weight, std=inner_dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] → [B, L, D]."""
        hidden: Tensor = self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))
        return hidden
