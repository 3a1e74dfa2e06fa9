"""What a recipe says about training on low-resolution pictures."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ldm_cli.config import Config


class LowResolutionConfig(Config):
    """Enlarging: the denoiser is given a low-resolution picture of each training picture (Ho et al. 2021,
    arXiv:2106.15282; Saharia et al. 2021, arXiv:2104.07636)."""

    factor: Annotated[int, Field(ge=2, le=16)]
    """How many pixels of the result a low-resolution pixel has along each side. With an autoencoder it is that one's
    factor: 4 in Stable Diffusion's upscaler."""
    noise_augmentation: Annotated[int, Field(ge=0, le=999)] = 350
    """Highest level of the noise on the low-resolution picture; each training picture has one between 0 and it, which
    the denoiser is given. When pictures are enlarged, the level says how freely details are made up."""
    noise_level: Annotated[int, Field(ge=0, le=999)] = 20
    """Level that pictures are enlarged with where none is asked for; it is cut to `noise_augmentation`."""
    blur: Annotated[float, Field(ge=0, le=8)] = 0.0
    """Largest σ of a Gaussian blur before the picture is shrunk, in low-resolution pixels; each has one between 0 and
    it."""
    jpeg: Annotated[int, Field(ge=1, le=100)] | None = None
    """Lowest quality of a JPEG compression of the low-resolution picture; each has one between it and 100. null:
    none."""
