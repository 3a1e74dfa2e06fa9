"""What a cascade says about each of its stages."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ldm_cli.config import Config
from ldm_cli.core.diffusion.config import GuidanceConfig
from ldm_cli.sampling.config import SamplerName, SamplingConfig

SHARED = ("negative", "long_prompts", "clip_skip", "batch_size", "precision", "compile")
"""Fields of `SamplingConfig` that all stages of a cascade take from the job."""


class StageConfig(Config):
    """How one stage of a cascade samples; the fields are those of `sampling`."""

    sampler: SamplerName | None = None
    """null: as the scheduler in the stage's folder does."""
    steps: Annotated[int, Field(ge=1, le=1000)] = 50
    """Number of steps."""
    eta: Annotated[float, Field(ge=0, le=1)] | None = None
    """How much fresh noise; null: the sampler's own."""
    timestep_spacing: Literal["leading", "linspace", "trailing", "karras", "exponential"] | None = None
    """null: as the scheduler in the stage's folder says."""
    guidance: GuidanceConfig = GuidanceConfig()
    """How the prompt steers."""
    noise_level: Annotated[int, Field(ge=0)] | None = None
    """Of stages that enlarge: level of the noise on the small picture, which hides its flaws; null: the model's own."""

    def sampling(self, job: SamplingConfig) -> SamplingConfig:
        """The settings of this stage, and of a job what all stages share."""
        own = {name: getattr(self, name) for name in type(self).model_fields if name != "noise_level"}
        return SamplingConfig(**own, **{name: getattr(job, name) for name in SHARED})
