"""The `eval` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ldm_cli.config import Config, NamesModel

MetricName = Literal["clip_score", "zero_shot", "retrieval", "reconstruction", "frechet_distance", "attribute_accuracy"]


_NEEDS: dict[str, tuple[str, ...]] = {
    "clip_score": ("clip",),
    "zero_shot": ("clip", "zero_shot"),
    "retrieval": ("clip",),
    "reconstruction": ("vae",),
    "frechet_distance": ("clip", "pipeline"),
    "attribute_accuracy": ("pipeline",),
}


class ZeroShotClassification(Config):
    """One classification by class prompts."""

    name: str
    """Name of the task in the result, e.g. `color`."""
    label: Annotated[str, Field(pattern=r"^(cls|json:.+)$")]
    """Place of the true class: `cls` (an index) or `json:FIELD` (an index, or one of `classes`). Samples without it are
    not counted."""
    classes: Annotated[tuple[str, ...], Field(min_length=2)]
    """Class names, in the order of the index."""
    templates: Annotated[tuple[Annotated[str, Field(pattern=r"\{\}")], ...], Field(min_length=1)] = ("a photo of a {}",)
    """Prompts per class; `{}` is replaced by the class name, and the embeddings of all templates are
    averaged."""


class EvalConfig(Config):
    """Models to evaluate, and metrics."""

    clip: Annotated[str | None, NamesModel()] = None
    """A CLIPModel: for `clip_score`, `zero_shot`, `retrieval`, `frechet_distance`."""
    vae: Annotated[str | None, NamesModel(("vae",))] = None
    """An AutoencoderKL or AutoencoderTiny: for `reconstruction` (PSNR, SSIM)."""
    pipeline: Annotated[str | None, NamesModel()] = None
    """Pipeline that generates pictures of the captions, for `clip_score`, `frechet_distance`,
    `attribute_accuracy`."""
    metrics: Annotated[tuple[MetricName, ...], Field(min_length=1)]
    """Metrics to compute."""
    num_samples: Annotated[int, Field(ge=1)] = 1000
    """Number of samples to use, the first ones of the shards."""
    num_generated: Annotated[int, Field(ge=1)] = 256
    """Number of pictures to generate: one for each of the first captions, the i-th (from 0) with seed
    `sampling.seed + i`."""
    zero_shot: tuple[ZeroShotClassification, ...] = ()
    """Classifications for `zero_shot`."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Samples per model call."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for metric in self.metrics:
            missing = [name for name in _NEEDS[metric] if not getattr(self, name)]
            if missing:
                raise ValueError(f"the metric {metric} needs {' and '.join(f'eval.{name}' for name in missing)}")
        return self
