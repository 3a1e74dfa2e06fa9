"""What a recipe says about sampling."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ldm_cli.config import Config

SamplerName = Literal["ddpm", "ddim", "euler", "dpmpp_2m"]


class SamplingConfig(Config):
    """Sampler, steps, guidance and size of the pictures; every field is also an option of `ldm sample`."""

    sampler: SamplerName = "ddim"
    """`ddpm` (Ho et al. 2020), `ddim` (Song et al. 2021), `euler` (Karras et al. 2022) or `dpmpp_2m` (Lu et
    al. 2022)."""
    steps: Annotated[int, Field(ge=1, le=1000)] = 50
    """Number of network evaluations per image (each counts conditional and unconditional once)."""
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    """DDIM's η: 0 is deterministic, 1 has DDPM's noise."""
    guidance: Annotated[float, Field(ge=0)] = 7.5
    """Classifier-free guidance scale (Ho & Salimans 2022); 1 is the plain conditional model."""
    negative: str = ""
    """Prompt that guidance steers away from; empty: the unconditional model."""
    timestep_spacing: Literal["leading", "linspace", "trailing"] | None = None
    """Which timesteps are visited (Lin et al. 2023, table 2); null: as the model's scheduler says."""
    images_per_prompt: Annotated[int, Field(ge=1)] = 4
    """Image i of a prompt has the seed `seed + i`."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the first image of every prompt."""
    width: Annotated[int, Field(ge=8)] | None = None
    """Image width in pixels; null: the size the model was trained at."""
    height: Annotated[int, Field(ge=8)] | None = None
    """Image height in pixels; null: the size the model was trained at."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Images denoised together on a GPU; on a CPU the image size decides. Never changes what is drawn."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of weights and activations."""
