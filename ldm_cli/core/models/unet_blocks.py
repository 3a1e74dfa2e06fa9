"""The levels of the U-Net: down, middle, up. Parameter names are those of diffusers.

Letters: B batch, C channels, H height, W width, E width of the timestep embedding, M text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ldm_cli.core.models.attention import AttentionBlock2D, JointAttentionBlock2D, Transformer2DModel
from ldm_cli.core.models.checkpointing import Checkpointed
from ldm_cli.core.models.layers import Activation, Downsample2D, ResnetBlock2D, Upsample2D


@dataclass(frozen=True)
class LevelSpec:
    """What the blocks of one resolution have in common."""

    channels: int
    embedding_dim: int
    groups: int
    eps: float
    attention_head_dim: int
    context_dim: int
    num_transformer_layers: int
    linear_projection: bool
    activation: Activation
    scale_shift: bool
    to_text_alone: bool = False

    def resnet(self, in_channels: int, resampling: Literal["down", "up"] | None = None) -> ResnetBlock2D:
        """A residual block from `in_channels` to this level's channels."""
        return ResnetBlock2D(
            in_channels,
            self.channels,
            embedding_dim=self.embedding_dim,
            groups=self.groups,
            eps=self.eps,
            activation=self.activation,
            scale_shift=self.scale_shift,
            resampling=resampling,
        )

    def attention(self, kind: str) -> nn.Module:
        """What a block of a kind has after its residual blocks.

        `attention_head_dim` is the number of heads of a Transformer, as its name in files is a slip, and else their
        width.
        """
        heads = self.channels // self.attention_head_dim
        if "SimpleCrossAttn" in kind:
            return JointAttentionBlock2D(self.channels, self.context_dim, heads, groups=self.groups)
        if "CrossAttn" not in kind:
            return AttentionBlock2D(self.channels, heads, groups=self.groups, eps=self.eps)
        return Transformer2DModel(
            self.channels,
            self.context_dim,
            self.attention_head_dim,
            self.num_transformer_layers,
            groups=self.groups,
            linear=self.linear_projection,
            to_text_alone=self.to_text_alone,
        )


def _has_attention(kind: str) -> bool:
    return "Attn" in kind


def _resamples_by_resnet(kind: str) -> bool:
    """Whether the way to the next level is a residual block, rather than a convolution."""
    return "Resnet" in kind or "SimpleCrossAttn" in kind


class DownBlock(Checkpointed):
    """Residual blocks, each with an attention if `kind` has one; then half the size, if `downsample`.

    Args:
        spec: this level.
        kind: as in `down_block_types`.
        in_channels: of what comes from above.
        num_layers: residual blocks.
        downsample: whether there is a way to the next level.
    """

    def __init__(self, spec: LevelSpec, kind: str, in_channels: int, num_layers: int, *, downsample: bool) -> None:
        super().__init__()
        self.has_attention, self.resamples_by_resnet = _has_attention(kind), _resamples_by_resnet(kind)
        if self.has_attention:
            self.attentions = nn.ModuleList(spec.attention(kind) for _ in range(num_layers))
        self.resnets = nn.ModuleList(spec.resnet(in_channels if i == 0 else spec.channels) for i in range(num_layers))
        self.downsamplers = nn.ModuleList()
        if downsample and self.resamples_by_resnet:
            self.downsamplers.append(spec.resnet(spec.channels, "down"))
        elif downsample:
            self.downsamplers.append(Downsample2D(spec.channels, asymmetric=False))

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor | None) -> list[Tensor]:
        """[B, C, H, W], activated embedding [B, E], text [B, M, D] → every result; the last is the output."""
        results = []
        for i, resnet in enumerate(self.resnets):
            x = self.run(resnet, x, embedding)
            if self.has_attention:
                x = self.attentions[i](x, context)
            results.append(x)
        for downsampler in self.downsamplers:
            results.append(self.run(downsampler, x, embedding) if self.resamples_by_resnet else downsampler(x))
        return results


class MidBlock(Checkpointed):
    """A residual block; with attention, by its `kind`, an attention and a second residual block follow."""

    def __init__(self, spec: LevelSpec, kind: str) -> None:
        super().__init__()
        self.has_attention = _has_attention(kind)
        if self.has_attention:
            self.attentions = nn.ModuleList([spec.attention(kind)])
        self.resnets = nn.ModuleList(spec.resnet(spec.channels) for _ in range(2 if self.has_attention else 1))

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor | None) -> Tensor:
        """[B, C, H, W], activated embedding [B, E], text [B, M, D] → [B, C, H, W]."""
        x = self.run(self.resnets[0], x, embedding)
        if self.has_attention:
            x = self.attentions[0](x, context)
            x = self.run(self.resnets[1], x, embedding)
        return x


class UpBlock(Checkpointed):
    """Residual blocks that take the results of the way down back in, attentions, and an enlargement.

    Args:
        spec: this level.
        kind: as in `up_block_types`.
        in_channels: of what comes from below.
        skip_channels: of the results of the way down, in the order in which they are taken.
        upsample: whether there is an enlargement at the end.
    """

    def __init__(
        self, spec: LevelSpec, kind: str, in_channels: int, skip_channels: list[int], *, upsample: bool
    ) -> None:
        super().__init__()
        self.has_attention, self.resamples_by_resnet = _has_attention(kind), _resamples_by_resnet(kind)
        if self.has_attention:
            self.attentions = nn.ModuleList(spec.attention(kind) for _ in skip_channels)
        self.resnets = nn.ModuleList(
            spec.resnet((in_channels if i == 0 else spec.channels) + skip) for i, skip in enumerate(skip_channels)
        )
        self.upsamplers = nn.ModuleList()
        if upsample:
            by_resnet = self.resamples_by_resnet
            self.upsamplers.append(spec.resnet(spec.channels, "up") if by_resnet else Upsample2D(spec.channels))

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor | None, skips: list[Tensor]) -> Tensor:
        """[B, C, H, W], embedding [B, E], text [B, M, D] → [B, C', H', W'], the size of the next skip.

        Takes its results of the way down from the end of `skips`.
        """
        for i, resnet in enumerate(self.resnets):
            x = self.run(resnet, torch.cat((x, skips.pop()), dim=1), embedding)
            if self.has_attention:
                x = self.attentions[i](x, context)
        for upsampler in self.upsamplers:
            size = tuple(skips[-1].shape[-2:])
            x = self.run(upsampler, x, embedding, size) if self.resamples_by_resnet else upsampler(x, size)
        return x
