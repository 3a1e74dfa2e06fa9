"""Stable Diffusion 3: a Transformer over image and text tokens (Esser et al. 2024, arXiv:2403.03206, section 4).

Parameter names are those of diffusers. Letters: B batch, C channels, h w size of the latents, p side of a patch,
L image tokens, M text tokens, D width, P side of the table of positions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_cli.core.condition import Condition
from ldm_cli.core.models.checkpointing import Checkpointable, Checkpointed
from ldm_cli.core.models.joint_transformer import JointTransformerBlock, Modulation, modulated
from ldm_cli.core.models.layers import TimestepEmbedding, timestep_embedding
from ldm_cli.core.models.sd3_transformer_2d_config import SD3Transformer2DConfig
from ldm_cli.core.patch_training import PatchSubset

_NUM_FREQUENCIES = 256


class SD3Transformer2DModel(Checkpointable, Checkpointed):
    """Predicts the velocity ε − x_0 from a noisy latent, a time and text tokens.

    Every modulation and the last layer begin at zero, so that each block begins as the identity (Peebles & Xie 2022,
    arXiv:2212.09748, "adaLN-Zero").
    """

    config_class = SD3Transformer2DConfig

    def __init__(self, config: SD3Transformer2DConfig) -> None:
        super().__init__()
        self.config = config
        dim, last = config.width, config.num_layers - 1
        self.pos_embed = PatchEmbed(config)
        self.time_text_embed = TimeTextEmbedding(dim, config.pooled_projection_dim)
        self.context_embedder = nn.Linear(config.joint_attention_dim, dim)
        self.transformer_blocks = nn.ModuleList(
            JointTransformerBlock(
                dim,
                config.num_attention_heads,
                qk_norm=config.qk_norm is not None,
                dual=i in config.dual_attention_layers,
                keeps_text=i < last,
            )
            for i in range(config.num_layers)
        )
        self.norm_out = Modulation(dim, 2)
        self.proj_out = nn.Linear(dim, config.patch_size**2 * config.out_channels)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.pos_embed.proj.weight.flatten(1))
        for layer in (m.linear for m in self.modules() if isinstance(m, Modulation)):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.proj_out.weight)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition,
        subset: PatchSubset | None = None,
        tokens_after: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The prediction for a noisy latent: a `Denoiser`.

        Args:
            x: [B, C, h, w]; p divides h and w, and neither is longer than P patches.
            t: float [B] or [1], 1000 times the share of noise σ.
            condition: `tokens` [B, M, joint_attention_dim], `pooled` [B, pooled_projection_dim]; `concat`
                [B, C', h, w] where `in_channels` is C + C'.
            subset: in training, the patches that are seen; the prediction is 0 elsewhere.
            tokens_after: in training, a number of blocks after which image tokens are asked for.

        Returns:
            [B, out_channels, h, w]; with `tokens_after` also the image tokens [B, L, D].

        Raises:
            ValueError: a condition is missing or of no use, or a size does not fit.
        """
        tokens, pooled = self._checked(x, condition)
        size = x.shape[-2:]
        image = self.pos_embed(x if condition.concat is None else torch.cat([x, condition.concat], dim=1))
        text: Tensor | None = self.context_embedder(tokens)
        embedding = F.silu(self.time_text_embed(t, pooled))
        num_patches, asked = image.shape[1], image
        for i, block in enumerate(self.transformer_blocks):
            if subset is not None and i == subset.first_block:
                image = subset.of(image)
            image, text = self.run(block, image, text, embedding)
            asked = image if i + 1 == tokens_after else asked
        scale, shift = self.norm_out(embedding)
        patches = self.proj_out(modulated(image, shift, scale))
        prediction = self._unpatchified(patches if subset is None else subset.spread(patches, num_patches), size)
        return prediction if tokens_after is None else (prediction, asked)

    def _unpatchified(self, patches: Tensor, size: torch.Size) -> Tensor:
        """[B, L, p·p·C] → [B, C, h, w]; the channel is the innermost index of a patch."""
        side, channels = self.config.patch_size, self.config.out_channels
        rows, columns = size[0] // side, size[1] // side
        split = patches.view(len(patches), rows, columns, side, side, channels)
        return split.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), channels, *size)

    def _checked(self, x: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """Tokens and pooled text."""
        if condition.tokens is None or condition.pooled is None:
            missing = "tokens" if condition.tokens is None else "pooled"
            raise ValueError(f"condition.{missing} is missing, but the network is conditioned on it")
        for name in ("image_tokens", "guidance"):
            if getattr(condition, name) is not None:
                raise ValueError(f"condition.{name} is given, but the network has no use for it")
        channels = x.shape[1] + (0 if condition.concat is None else condition.concat.shape[1])
        if channels != self.config.in_channels:
            raise ValueError(
                f"{channels} channels in x and condition.concat, but in_channels={self.config.in_channels}"
            )
        return condition.tokens, condition.pooled


class PatchEmbed(nn.Module):
    """Patches as tokens, with their positions added."""

    pos_embed: Tensor

    def __init__(self, config: SD3Transformer2DConfig) -> None:
        super().__init__()
        self.side, self.max_size = config.patch_size, config.pos_embed_max_size
        self.proj = nn.Conv2d(config.in_channels, config.width, self.side, stride=self.side)
        base = config.sample_size // self.side
        self.register_buffer("pos_embed", position_table(self.max_size, base, config.width)[None])

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] → [B, L, D], row by row.

        Raises:
            ValueError: p does not divide h or w, or there are more than P patches.
        """
        height, width = x.shape[-2:]
        if height % self.side or width % self.side:
            raise ValueError(f"{width}×{height} latent pixels: not a multiple of patch_size={self.side}")
        rows, columns = height // self.side, width // self.side
        if max(rows, columns) > self.max_size:
            raise ValueError(f"{columns}×{rows} patches, more than pos_embed_max_size={self.max_size}")
        top, left = (self.max_size - rows) // 2, (self.max_size - columns) // 2
        table = self.pos_embed.view(self.max_size, self.max_size, -1)
        positions = table[top : top + rows, left : left + columns].flatten(0, 1)
        tokens: Tensor = self.proj(x).flatten(2).transpose(1, 2) + positions.to(x.dtype)
        return tokens


def position_table(max_size: int, base: int, dim: int) -> Tensor:
    """Sinusoids of the column, then of the row, of each patch: float32 [P², D] in [-1, 1].

    Args:
        max_size: P.
        base: patches along a side whose positions are 0 … base; a table of another size covers the same range.
        dim: D, a multiple of 4.
    """
    axis = torch.arange(max_size, dtype=torch.float64) / (max_size / base)
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angles = axis[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    by_column = waves[None, :].expand(max_size, -1, -1)
    by_row = waves[:, None].expand(-1, max_size, -1)
    return torch.cat([by_column, by_row], dim=2).flatten(0, 1).float()


class TimeTextEmbedding(nn.Module):
    """The sum of what is made of the time and of the pooled text."""

    def __init__(self, dim: int, pooled_dim: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(_NUM_FREQUENCIES, dim)
        self.text_embedder = TimestepEmbedding(pooled_dim, dim)

    def forward(self, t: Tensor, pooled: Tensor) -> Tensor:
        """[B] or [1], and [B, pooled_dim] → [B, D]."""
        waves = timestep_embedding(t, _NUM_FREQUENCIES, flip_sin_to_cos=True, freq_shift=0)
        weight = self.text_embedder.linear_1.weight
        embedding: Tensor = self.timestep_embedder(waves.to(weight.dtype)) + self.text_embedder(pooled.to(weight.dtype))
        return embedding
