"""What a cascade says about each of its stages."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ldm_cli.config import Config
from ldm_cli.sampling.config import SamplingConfig

SHARED = ("negative", "long_prompts", "clip_skip", "batch_size", "precision", "compile")
"""Fields of `SamplingConfig` that all stages of a cascade take from the job."""


class StageConfig(Config):
    """How one stage of a cascade samples."""

    sampling: SamplingConfig = SamplingConfig()
    """Sampler, steps, guidance; size, seeds, negative prompt and precision are those of the job."""
    noise_level: Annotated[int, Field(ge=0, le=999)] | None = None
    """Of a stage that enlarges: level of the noise on the small picture, which hides its flaws; null: the model's own.
    The first stage has no use for it."""

    def for_job(self, job: SamplingConfig) -> SamplingConfig:
        """The settings of this stage, and of a job what all stages share."""
        return self.sampling.model_copy(update={name: getattr(job, name) for name in SHARED})
