"""The models of `ldm eval`: those that a recipe's metrics need, and no others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm_cli.evaluation.clip_features import CLIPFeatures
from ldm_cli.evaluation.config import PICTURE_METRICS, EvalConfig
from ldm_cli.evaluation.dinov2_features import DINOv2Features
from ldm_cli.evaluation.inception_features import InceptionFeatures
from ldm_cli.evaluation.perceptual_distance import PerceptualDistance
from ldm_cli.evaluation.picture_metrics import needed_taps
from ldm_cli.families.codec_folder import Autoencoder, open_codec
from ldm_cli.families.family import place
from ldm_cli.families.open_family import open_family, resolve_model
from ldm_cli.formats.hub import recorded
from ldm_cli.formats.model_source import weights_sha256
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.picture_pipeline import PicturePipeline
from ldm_cli.sampling.pipeline_of import pipeline_of

_METRICS_BY_MODEL = {
    "clip": {"clip_score", "zero_shot", "linear_probe", "retrieval", "frechet_distance", "cmmd"},
    "vae": {"reconstruction", "lpips", "rfid"},
    "pipeline": {"clip_score", "frechet_distance", "attribute_accuracy", *PICTURE_METRICS},
    "pipelines": {"clip_score", "frechet_distance", "attribute_accuracy", *PICTURE_METRICS},
    "inception": {"fid", "kid", "prdc", "is", "rfid"},
    "dinov2": {"fd_dinov2"},
    "lpips": {"lpips"},
}


def needed_models(config: EvalConfig) -> dict[str, dict[str, str]]:
    """Field of the recipe → folder or file by name, for the models that its metrics need.

    The name is that of the field, but for `pipelines`.
    """
    used = {name for name, metrics in _METRICS_BY_MODEL.items() if metrics & set(config.metrics)}
    given = {name: getattr(config, name) for name in _METRICS_BY_MODEL if name in used}
    return {name: value if isinstance(value, dict) else {name: value} for name, value in given.items() if value}


@dataclass(frozen=True)
class Models:
    """The models that measure, and those that are measured but for pipelines.

    Attributes:
        clip, vae, inception, dinov2, lpips: None where no metric needs it.
        provenance: source and hash of each.
    """

    clip: CLIPFeatures | None
    vae: Autoencoder | None
    inception: InceptionFeatures | None
    dinov2: DINOv2Features | None
    lpips: PerceptualDistance | None
    device: torch.device
    provenance: dict[str, Any]

    @classmethod
    def load(cls, config: EvalConfig, device: torch.device) -> Models:
        """Read the models; errors as in the functions that read each, such as `CLIPFeatures.load`."""
        needed, provenance = needed_models(config), dict[str, Any]()
        folders = {name: resolve_model(Path(needed[name][name])) for name in ("clip", "vae") if name in needed}
        clip = CLIPFeatures.load(folders["clip"], device) if "clip" in folders else None
        vae = open_codec(folders["vae"]) if "vae" in folders else None
        if vae is not None:
            place(device, torch.float32, vae)
        for name, folder in folders.items():
            provenance[name] = {"folder": recorded(folder), "sha256": weights_sha256(folder)}
        inception = None
        if needed_taps(config.metrics) and config.inception is not None:
            inception = InceptionFeatures.load(Path(config.inception), device, config.preprocessing)
            provenance["inception"] = inception.provenance
        dinov2 = None
        if "dinov2" in needed:
            dinov2 = DINOv2Features(resolve_model(Path(needed["dinov2"]["dinov2"])), device)
            provenance["dinov2"] = dinov2.provenance
        lpips = None
        if "lpips" in needed:
            lpips = PerceptualDistance(Path(needed["lpips"]["lpips"]), device)
            provenance["lpips"] = lpips.provenance
        return cls(clip, vae, inception, dinov2, lpips, device, provenance)


class Pipelines:
    """The pipelines to measure by name, of which one is loaded at a time.

    Args:
        sampling: with `precision` and `compile` as they are on this machine.
    """

    def __init__(self, config: EvalConfig, sampling: SamplingConfig, device: torch.device) -> None:
        needed = needed_models(config)
        self._folders = needed.get("pipeline") or needed.get("pipelines", {})
        self._sampling, self._device = sampling, device
        self._loaded: dict[str, PicturePipeline] = {}

    @staticmethod
    def are_needed(config: EvalConfig) -> bool:
        """Whether a metric takes generated pictures."""
        return bool({"pipeline", "pipelines"} & needed_models(config).keys())

    @property
    def names(self) -> list[str]:
        """In the order of the recipe."""
        return list(self._folders)

    def load(self, name: str) -> PicturePipeline:
        """A pipeline, in place of the one that was loaded before; errors as in `open_family`."""
        if name not in self._loaded:
            self._loaded.clear()
            compiled = self._sampling.compile is True
            folder = Path(self._folders[name])
            family = open_family(folder, self._device, self._sampling.precision, compiled=compiled)
            self._loaded[name] = pipeline_of(family)
        return self._loaded[name]

    def provenance(self, name: str) -> dict[str, Any]:
        """Source and hashes of a pipeline."""
        family = self.load(name).family
        assert family.folder is not None
        return {"folder": recorded(family.folder), "sha256": family.weights_sha256, "compile": self._sampling.compile}
