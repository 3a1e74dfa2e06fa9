"""Convolutional blocks that the U-Net and the autoencoder share. Parameter names are those of diffusers.

Letters: B batch, C channels, H height, W width, E width of the timestep embedding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_cli.core.compiling import Region
from ldm_cli.core.models.convolution import norm_silu_conv, upsample_conv
from ldm_cli.core.models.linear import linear


def timestep_embedding(timesteps: Tensor, dim: int, *, flip_sin_to_cos: bool, freq_shift: int) -> Tensor:
    """Sinusoids of the timestep, wavelengths from 2π to 10000·2π (Vaswani et al. 2017, section 3.5).

    Args:
        timesteps: [B], any real type; in units of training steps.
        dim: even width of the embedding.
        flip_sin_to_cos: order (cos, sin) instead of (sin, cos).
        freq_shift: subtracted from the divisor dim / 2 of the exponents.

    Returns:
        float32 [B, dim] in [-1, 1].
    """
    half = dim // 2
    indices = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(indices * -math.log(10000.0) / (half - freq_shift))
    angles = timesteps.float()[:, None] * frequencies
    sin, cos = angles.sin(), angles.cos()
    return torch.cat((cos, sin) if flip_sin_to_cos else (sin, cos), dim=-1)


def repeated(x: Tensor, rows: int) -> Tensor:
    """[B, …] → [rows, …], in the same memory order: all of x again for each of rows / B contexts."""
    return x if len(x) == rows else torch.cat([x] * (rows // len(x)))


class TimestepEmbedding(nn.Module):
    """Two linear layers with a SiLU between them; optionally a second vector is added to the input."""

    def __init__(self, in_channels: int, out_channels: int, cond_proj_dim: int | None = None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, out_channels)
        self.cond_proj = None if cond_proj_dim is None else nn.Linear(cond_proj_dim, in_channels, bias=False)
        self.linear_2 = nn.Linear(out_channels, out_channels)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """[B, in_channels] (and [B, cond_proj_dim]) → [B, E]."""
        if self.cond_proj is not None and condition is not None:
            x = x + self.cond_proj(condition)
        hidden: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return hidden


def pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1×1 convolution of [B, C, H, W] as the matrix product that it is, in channels-last order a view on both sides.

    A convolution of that size runs at a third of a matrix product's speed on a CPU.
    """
    tokens = linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias)
    return tokens.permute(0, 3, 1, 2)


class ResnetBlock2D(Region):
    """Two 3×3 convolutions, each after group norm and SiLU, around which the input is added.

    Args:
        in_channels, out_channels: where they differ the input passes a 1×1 convolution.
        embedding_dim: E; None for a block without timestep.
        groups, eps: of both group norms.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, embedding_dim: int | None, groups: int, eps: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = None if embedding_dim is None else nn.Linear(embedding_dim, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = None if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """[R·B, C, H, W] and the *activated* timestep embedding silu(e) [B, E] or [1, E] → [R·B, C', H, W].

        The activation is the same for every block of a network, so the network applies it once.
        """
        hidden = norm_silu_conv(x, self.norm1, self.conv1)
        if self.time_emb_proj is not None:
            hidden = hidden + repeated(self.time_emb_proj(embedding), len(hidden))[:, :, None, None]
        hidden = norm_silu_conv(hidden, self.norm2, self.conv2)
        if self.conv_shortcut is not None:
            x = pointwise(self.conv_shortcut, x)
        result: Tensor = x + hidden
        return result


class Downsample2D(nn.Module):
    """A 3×3 convolution of stride 2.

    Args:
        channels: C, kept.
        asymmetric: pad below and to the right only, as the autoencoder does, instead of on all sides.
    """

    def __init__(self, channels: int, *, asymmetric: bool) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, ceil(H / 2), ceil(W / 2)]; the asymmetric one rounds down."""
        if self.asymmetric:
            x = F.pad(x, (0, 1, 0, 1))
        hidden: Tensor = self.conv(x)
        return hidden


class Upsample2D(nn.Module):
    """Nearest-neighbour enlargement and a 3×3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """[B, C, H, W] → [B, C, *size]."""
        return upsample_conv(x, size, self.conv)
