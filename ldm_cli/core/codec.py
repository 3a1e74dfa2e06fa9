"""Codecs: what turns images into the latents that a denoiser works on, and back.

Letters: B batch, C channels and h w size of the latents, H W size of the images.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class Codec(Protocol):
    """Images to latents of deviation about 1, and back."""

    @property
    def channels(self) -> int:
        """C."""

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel, along each side: H = h · factor."""

    def moments(self, images: Tensor) -> dict[str, Tensor]:
        """Images [B, 3, H, W] in [-1, 1] → float32 tensors [B, …] by name: what a cache keeps of them."""

    def latents(self, moments: Mapping[str, Tensor], noise: Tensor | None = None) -> Tensor:
        """Moments → latents [B, C, h, w]: a sample, with standard normal noise of their shape, else the mode."""

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] → the mode of their latents, [B, C, h, w]."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] → images [B, 3, H, W], about [-1, 1], not clamped."""


class PixelCodec:
    """The identity: the latents are the pixels."""

    channels = 3
    factor = 1

    def moments(self, images: Tensor) -> dict[str, Tensor]:
        """The images themselves."""
        return {"pixels": images.float()}

    def latents(self, moments: Mapping[str, Tensor], noise: Tensor | None = None) -> Tensor:
        """The images themselves, which have no distribution."""
        return moments["pixels"]

    def encode(self, images: Tensor) -> Tensor:
        """The images themselves."""
        return images.float()

    def decode(self, latents: Tensor) -> Tensor:
        """The latents themselves."""
        return latents
