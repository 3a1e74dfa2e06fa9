"""The levels of the U-Net: down, middle, up. Parameter names are those of diffusers.

Letters: B batch, C channels, H height, W width, E width of the timestep embedding, M text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm_cli.core.models.attention import Transformer2DModel
from ldm_cli.core.models.checkpointing import Checkpointed
from ldm_cli.core.models.layers import Downsample2D, ResnetBlock2D, Upsample2D


@dataclass(frozen=True)
class LevelSpec:
    """What the blocks of one resolution have in common."""

    channels: int
    embedding_dim: int
    groups: int
    eps: float
    num_heads: int
    context_dim: int
    num_transformer_layers: int
    linear_projection: bool

    def resnet(self, in_channels: int) -> ResnetBlock2D:
        """A residual block from `in_channels` to this level's channels."""
        return ResnetBlock2D(
            in_channels, self.channels, embedding_dim=self.embedding_dim, groups=self.groups, eps=self.eps
        )

    def attention(self) -> Transformer2DModel:
        """A Transformer at this level."""
        return Transformer2DModel(
            self.channels,
            self.context_dim,
            self.num_heads,
            self.num_transformer_layers,
            groups=self.groups,
            linear=self.linear_projection,
        )


class DownBlock(Checkpointed):
    """Residual blocks, each with a Transformer if `attention`; a stride-2 convolution if `downsample`."""

    def __init__(
        self, spec: LevelSpec, in_channels: int, num_layers: int, *, attention: bool, downsample: bool
    ) -> None:
        super().__init__()
        if attention:
            self.attentions = nn.ModuleList(spec.attention() for _ in range(num_layers))
        self.has_attention = attention
        self.resnets = nn.ModuleList(spec.resnet(in_channels if i == 0 else spec.channels) for i in range(num_layers))
        self.downsamplers = nn.ModuleList([Downsample2D(spec.channels, asymmetric=False)] if downsample else [])

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor | None) -> list[Tensor]:
        """[B, C, H, W], activated embedding [B, E], text [B, M, D] → every result; the last is the output."""
        results = []
        for i, resnet in enumerate(self.resnets):
            x = self.run(resnet, x, embedding)
            if self.has_attention:
                x = self.attentions[i](x, context)
            results.append(x)
        for downsampler in self.downsamplers:
            results.append(downsampler(x))
        return results


class MidBlock(Checkpointed):
    """A residual block; with attention a Transformer and a second residual block follow."""

    def __init__(self, spec: LevelSpec, *, attention: bool) -> None:
        super().__init__()
        if attention:
            self.attentions = nn.ModuleList([spec.attention()])
        self.has_attention = attention
        self.resnets = nn.ModuleList(spec.resnet(spec.channels) for _ in range(2 if attention else 1))

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor | None) -> Tensor:
        """[B, C, H, W], activated embedding [B, E], text [B, M, D] → [B, C, H, W]."""
        x = self.run(self.resnets[0], x, embedding)
        if self.has_attention:
            x = self.attentions[0](x, context)
            x = self.run(self.resnets[1], x, embedding)
        return x


class UpBlock(Checkpointed):
    """Residual blocks that take the results of the way down back in, Transformers, and an enlargement.

    Args:
        spec: this level.
        in_channels: of what comes from below.
        skip_channels: of the results of the way down, in the order in which they are taken.
        attention, upsample: whether there are Transformers, and an enlargement at the end.
    """

    def __init__(
        self, spec: LevelSpec, in_channels: int, skip_channels: list[int], *, attention: bool, upsample: bool
    ) -> None:
        super().__init__()
        if attention:
            self.attentions = nn.ModuleList(spec.attention() for _ in skip_channels)
        self.has_attention = attention
        self.resnets = nn.ModuleList(
            spec.resnet((in_channels if i == 0 else spec.channels) + skip) for i, skip in enumerate(skip_channels)
        )
        self.upsamplers = nn.ModuleList([Upsample2D(spec.channels)] if upsample else [])

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor | None, skips: list[Tensor]) -> Tensor:
        """[B, C, H, W], embedding [B, E], text [B, M, D] → [B, C', H', W'], the size of the next skip.

        Takes its results of the way down from the end of `skips`.
        """
        for i, resnet in enumerate(self.resnets):
            x = self.run(resnet, torch.cat((x, skips.pop()), dim=1), embedding)
            if self.has_attention:
                x = self.attentions[i](x, context)
        for upsampler in self.upsamplers:
            x = upsampler(x, tuple(skips[-1].shape[-2:]))
        return x
