"""The `eval` section of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from ldm_cli.config import Config, NamesModel

PictureMetric = Literal["fid", "kid", "prdc", "is", "cmmd", "fd_dinov2"]
"""A metric of two sets of pictures, or (`is`) of the generated ones, that other programs have as well."""
PICTURE_METRICS: tuple[PictureMetric, ...] = get_args(PictureMetric)

MetricName = Literal[
    "clip_score",
    "zero_shot",
    "linear_probe",
    "retrieval",
    "reconstruction",
    "frechet_distance",
    "attribute_accuracy",
    "lpips",
    "rfid",
    PictureMetric,
]

Preprocessing = Literal["pytorch-fid", "clean", "torch-fidelity"]
"""The program whose preparation of pictures for the Inception network is taken; `clean` is clean-fid's default mode."""
PREPROCESSINGS: tuple[Preprocessing, ...] = get_args(Preprocessing)

_NEEDS: dict[str, tuple[str, ...]] = {
    "clip_score": ("clip",),
    "zero_shot": ("clip", "zero_shot"),
    "linear_probe": ("clip", "zero_shot", "probe_shards"),
    "retrieval": ("clip",),
    "reconstruction": ("vae",),
    "lpips": ("vae", "lpips"),
    "rfid": ("vae", "inception"),
    "frechet_distance": ("clip", "pipeline"),
    "attribute_accuracy": ("pipeline",),
    **dict.fromkeys(PICTURE_METRICS, ("inception", "pipeline")),
    "cmmd": ("clip", "pipeline"),
    "fd_dinov2": ("dinov2", "pipeline"),
}
HOW_TO_GET_INCEPTION = (
    "take pt_inception-2015-12-05-6726825d.pth of the releases of pytorch-fid or torch-fidelity, and convert it once: "
    "ldm convert FILE.pth inception.safetensors --allow-pickle"
)
"""Remedy where the weights of the Inception network are missing."""
HOW_TO_GET_LPIPS = (
    "take torchvision's file of AlexNet or VGG-16 and the heads alex.pth or vgg.pth of the package lpips, and convert "
    "them once: ldm convert CLASSIFIER.pth lpips.safetensors --lpips-heads HEADS.pth --allow-pickle"
)
"""Remedy where the weights of LPIPS are missing."""


PipelineName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")]


class ZeroShotClassification(Config):
    """One classification by class prompts."""

    name: str
    """Name of the task in the result, e.g. `color`."""
    label: Annotated[str, Field(pattern=r"^(cls|json:.+)$")] = "json:class"
    """Place of the true class: `cls` (an index) or `json:FIELD` (an index, or one of `classes`), of which `ldm data
    pack` writes `json:class`. Samples without it are not counted."""
    classes: Annotated[tuple[str, ...], Field(min_length=2)] = ()
    """Class names, in the order of the index; by default the texts that the samples have at `label`."""
    templates: Annotated[tuple[Annotated[str, Field(pattern=r"\{\}")], ...], Field(min_length=1)] = ("a photo of a {}",)
    """Prompts per class; `{}` is replaced by the class name, and the embeddings of all templates are
    averaged."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.label == "cls" and not self.classes:
            raise ValueError("label=cls is a number and needs classes; label: json:class takes names from the data")
        return self


class EvalConfig(Config):
    """Models to evaluate, and metrics."""

    clip: Annotated[str | None, NamesModel()] = None
    """A CLIPModel: for `clip_score`, `zero_shot`, `linear_probe`, `retrieval`, `frechet_distance`, `cmmd`."""
    inception: str | None = None
    """File with the weights of FID's Inception network, in safetensors: for `fid`, `kid`, `prdc`, `is`,
    `rfid`."""
    dinov2: Annotated[str | None, NamesModel()] = None
    """A Dinov2Model: for `fd_dinov2`."""
    lpips: str | None = None
    """File with the weights of LPIPS, in safetensors: for `lpips`."""
    preprocessing: Preprocessing = "torch-fidelity"
    """Program whose preparation of pictures for the Inception network is taken."""
    vae: Annotated[str | None, NamesModel(("vae",))] = None
    """An AutoencoderKL, AutoencoderTiny or VQModel: for `reconstruction` (PSNR, SSIM), `lpips`, `rfid`."""
    pipeline: Annotated[str | None, NamesModel()] = None
    """Pipeline that generates pictures of the captions, for `clip_score`, `frechet_distance`,
    `attribute_accuracy`, `fid`, `kid`, `prdc`, `is`, `cmmd`, `fd_dinov2`."""
    pipelines: Annotated[dict[PipelineName, str], NamesModel()] = Field(default_factory=dict)
    """Several such pipelines by names of your choice, in place of `pipeline`: each is measured."""
    metrics: Annotated[tuple[MetricName, ...], Field(min_length=1)]
    """Metrics to compute."""
    num_samples: Annotated[int, Field(ge=1)] = 1000
    """Number of samples to use, the first ones of the shards."""
    num_generated: Annotated[int, Field(ge=1)] = 256
    """Number of pictures to generate: one for each of the first captions, the i-th (from 0) with seed
    `sampling.seed + i`."""
    new_colors: bool = False
    """Whether `attribute_accuracy` tells the new colour maroon from the eight others; if not, it takes the nearest of
    those eight."""
    keep_pictures: bool = False
    """Whether the generated pictures are kept beside the result, each point of a sweep in a folder as of `ldm sample`;
    that takes `--out`."""
    zero_shot: tuple[ZeroShotClassification, ...] = ()
    """Classifications for `zero_shot` and `linear_probe`."""
    probe_shards: str | tuple[str, ...] | None = None
    """Training shards of `linear_probe`: a classifier is fitted to them, and measured on `data.shards`."""
    num_probe_samples: Annotated[int, Field(ge=2)] = 10_000
    """Number of samples of `probe_shards` to use, the first ones."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Samples per model call."""

    @property
    def picture_metrics(self) -> tuple[PictureMetric, ...]:
        """The metrics that `ldm compare` has as well."""
        return tuple(metric for metric in PICTURE_METRICS if metric in self.metrics)

    @property
    def named_pipelines(self) -> Mapping[str, str]:
        """The folders of `pipelines`, or that of `pipeline` as the only one, by name."""
        return {"pipeline": self.pipeline} if self.pipeline else self.pipelines

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.pipeline and self.pipelines:
            raise ValueError("eval.pipeline and eval.pipelines exclude each other")
        for metric in self.metrics:
            given = {name: getattr(self, name) for name in _NEEDS[metric]} | {"pipeline": self.named_pipelines}
            missing = [name for name in _NEEDS[metric] if not given[name]]
            if missing:
                remedy = f": {HOW_TO_GET_INCEPTION}; or measure frechet_distance" if "inception" in missing else ""
                remedy += f": {HOW_TO_GET_LPIPS}" if "lpips" in missing else ""
                needed = " and ".join(f"eval.{name}" for name in missing)
                raise ValueError(f"the metric {metric} needs {needed}{remedy}")
        return self
