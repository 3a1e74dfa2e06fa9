"""What a recipe says about evaluation."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ldm_cli.config import Config

MetricName = Literal["clip_score", "zero_shot", "retrieval", "reconstruction", "frechet_distance", "attribute_accuracy"]


_NEEDS: dict[str, tuple[str, ...]] = {
    "clip_score": ("clip",),
    "zero_shot": ("clip", "zero_shot"),
    "retrieval": ("clip",),
    "reconstruction": ("vae",),
    "frechet_distance": ("clip", "pipeline"),
    "attribute_accuracy": ("pipeline",),
}


class ZeroShotTask(Config):
    """One classification by class prompts."""

    name: str
    """Name of the task in the result, e.g. `color`."""
    label: Annotated[str, Field(pattern=r"^(cls|json:.+)$")]
    """Where the true class is: `cls` (an index) or `json:FIELD` (an index, or one of `classes`; samples
    where it is missing or null are left out)."""
    classes: Annotated[tuple[str, ...], Field(min_length=2)]
    """Class names, in the order of the index."""
    templates: Annotated[tuple[Annotated[str, Field(pattern=r"\{\}")], ...], Field(min_length=1)] = ("a photo of a {}",)
    """Prompts per class; `{}` is replaced by the class name, and the embeddings of all templates are
    averaged."""


class EvalConfig(Config):
    """Which models, and which metrics of them."""

    clip: str | None = None
    """CLIPModel folder: for `clip_score`, `zero_shot`, `retrieval`, `frechet_distance`."""
    vae: str | None = None
    """AutoencoderKL folder: for `reconstruction` (PSNR, SSIM)."""
    pipeline: str | None = None
    """Pipeline folder: pictures are drawn for the captions, for `clip_score`, `frechet_distance`,
    `attribute_accuracy`."""
    metrics: Annotated[tuple[MetricName, ...], Field(min_length=1)]
    """What to measure."""
    num_samples: Annotated[int, Field(ge=1)] = 1000
    """How many samples of the shards to use: the first ones."""
    num_generated: Annotated[int, Field(ge=1)] = 256
    """How many pictures to draw: one for each of the first captions, the i-th (from 0) with the seed
    `sampling.seed + i`."""
    zero_shot: tuple[ZeroShotTask, ...] = ()
    """Classifications for `zero_shot`."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Samples per network call."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for metric in self.metrics:
            missing = [name for name in _NEEDS[metric] if not getattr(self, name)]
            if missing:
                raise ValueError(f"the metric {metric} needs {' and '.join(f'eval.{name}' for name in missing)}")
        return self
