"""What a recipe says about evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ldm_cli.config import Config
from ldm_cli.sampling.config import SamplingConfig

MetricName = Literal[
    "clip_score", "zero_shot", "retrieval", "reconstruction", "frechet_distance", "attribute_accuracy"
]


class ZeroShotTask(Config):
    """One classification by class prompts."""

    name: str
    """Name of the task in the result, e.g. `color`."""
    label: str
    """Where the true class is: `cls` (an index) or `json:FIELD` (an index, or one of `classes`)."""
    classes: tuple[str, ...]
    """Class names, in the order of the index."""
    templates: tuple[str, ...] = ("a photo of a {}",)
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
    metrics: tuple[MetricName, ...]
    """What to measure."""
    num_samples: Annotated[int, Field(ge=1)] = 1000
    """How many samples of the shards to use: the first ones."""
    num_generated: Annotated[int, Field(ge=1)] = 256
    """How many pictures to draw, one per caption."""
    zero_shot: tuple[ZeroShotTask, ...] = ()
    """Classifications for `zero_shot`."""
    sampling: SamplingConfig = SamplingConfig()
    """How pictures are drawn."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Samples per network call."""
