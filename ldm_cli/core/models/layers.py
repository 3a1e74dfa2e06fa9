"""Convolutional blocks that the U-Net and the autoencoder share. Parameter names are those of diffusers.

Letters: B batch, C channels, H height, W width, E width of the timestep embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_cli.core.compiling import Region

Activation = Literal["silu", "swish", "gelu"]
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"silu": F.silu, "swish": F.silu, "gelu": F.gelu}
"""By the names of diffusers."""


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


def guidance_embedding(scale: float, dim: int) -> Tensor:
    """Sinusoids of a guidance scale w, for denoisers that were distilled with guidance: float32 [1, dim].

    Of 1000 (w − 1), as diffusers' `get_guidance_scale_embedding` (Meng et al. 2023, arXiv:2210.03142, section 3.1; Luo
    et al. 2023, arXiv:2310.04378). An odd `dim` ends in 0.
    """
    value = torch.tensor([1000.0 * (scale - 1.0)])
    embedding = timestep_embedding(value, dim - dim % 2, flip_sin_to_cos=False, freq_shift=1)
    return F.pad(embedding, (0, dim % 2))


class TimestepEmbedding(nn.Module):
    """Two linear layers with an activation between them; optionally a second vector is added to the input."""

    def __init__(
        self, in_channels: int, out_channels: int, cond_proj_dim: int | None = None, activation: Activation = "silu"
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.linear_1 = nn.Linear(in_channels, out_channels)
        self.cond_proj = None if cond_proj_dim is None else nn.Linear(cond_proj_dim, in_channels, bias=False)
        self.linear_2 = nn.Linear(out_channels, out_channels)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """[B, in_channels] (and [B, cond_proj_dim]) → [B, E]."""
        if self.cond_proj is not None and condition is not None:
            x = x + self.cond_proj(condition)
        hidden: Tensor = self.linear_2(self.activation(self.linear_1(x)))
        return hidden


class ResnetBlock2D(Region):
    """x + conv2(silu(norm2(conv1(silu(norm1(x))) + e))), with e a projection of the timestep embedding.

    Args:
        in_channels, out_channels: C and C'. If they differ, a 1×1 convolution brings x to C' before the sum.
        embedding_dim: E; None for a block without timestep.
        groups, eps: of both group norms.
        activation: in place of SiLU.
        scale_shift: norm2(conv1(…)) (1 + s) + e in place of norm2(conv1(…) + e) (Dhariwal & Nichol 2021, eq. 4, section
            3.1, arXiv:2105.05233); the projection gives s and e.
        resampling: x and the activations before conv1 are averaged over 2×2 pixels, or enlarged (ibid.).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        embedding_dim: int | None,
        groups: int,
        eps: float,
        activation: Activation = "silu",
        scale_shift: bool = False,
        resampling: Literal["down", "up"] | None = None,
    ) -> None:
        super().__init__()
        self.activation, self.scale_shift, self.resampling = ACTIVATIONS[activation], scale_shift, resampling
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        width = 2 * out_channels if scale_shift else out_channels
        self.time_emb_proj = None if embedding_dim is None else nn.Linear(embedding_dim, width)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = None if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor | None = None, size: tuple[int, int] | None = None) -> Tensor:
        """[B, C, H, W] and the *activated* timestep embedding, [B, E] or [1, E] → [B, C', H', W'].

        The activation is the same for every block of a network, so the network applies it once. A block that enlarges
        does so to `size`; one that does not resample keeps H and W.
        """
        hidden = self.activation(self.norm1(x))
        if self.resampling is not None:
            x, hidden = self._resampled(x, size), self._resampled(hidden, size)
        hidden = self.conv1(hidden)
        scale: Tensor | None = None
        if self.time_emb_proj is not None:
            shift = self.time_emb_proj(embedding)[:, :, None, None]
            if self.scale_shift:
                scale, shift = shift.chunk(2, dim=1)
                hidden = self.norm2(hidden) * (1 + scale) + shift
            else:
                hidden = hidden + shift
        hidden = self.conv2(self.activation(hidden if scale is not None else self.norm2(hidden)))
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        result: Tensor = shortcut + hidden
        return result

    def _resampled(self, x: Tensor, size: tuple[int, int] | None) -> Tensor:
        return F.avg_pool2d(x, 2) if self.resampling == "down" else F.interpolate(x, size=size, mode="nearest")


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
        enlarged: Tensor = self.conv(F.interpolate(x, size=size, mode="nearest"))
        return enlarged
