"""What `ldm eval` measures: one pass over real images, one over pictures that are generated for their captions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.inception import NUM_FEATURES
from ldm_cli.core.pixels import to_bytes, to_signed
from ldm_cli.data.batch import Batch
from ldm_cli.data.loader import sequential_batches
from ldm_cli.data.shards import ShardSet
from ldm_cli.errors import DataError, DivergedError
from ldm_cli.evaluation.clip_features import CLIPFeatures
from ldm_cli.evaluation.config import PICTURE_METRICS
from ldm_cli.evaluation.image_quality import psnr, ssim
from ldm_cli.evaluation.inception_features import InceptionFeatures
from ldm_cli.evaluation.picture_metrics import CLIP, PictureFeatures, needed_taps
from ldm_cli.evaluation.scene_detector import SeenScene, read_scenes
from ldm_cli.families.family import place
from ldm_cli.families.open_family import open_family, resolve_model
from ldm_cli.formats.model_folder import load_model
from ldm_cli.formats.weight_files import weights_sha256
from ldm_cli.recipe.schema import EvalRecipe, EvalSection
from ldm_cli.reporting import Reporter
from ldm_cli.sampling.pipeline import Pipeline
from ldm_cli.sampling.pixels import is_sound
from ldm_cli.sampling.request import ImageRequest

_METRICS_BY_MODEL = {
    "clip": {"clip_score", "zero_shot", "retrieval", "frechet_distance", "cmmd"},
    "vae": {"reconstruction"},
    "pipeline": {"clip_score", "frechet_distance", "attribute_accuracy", *PICTURE_METRICS},
}
_REQUESTS_PER_CALL = 256


@dataclass(frozen=True)
class Models:
    """What the metrics of a recipe need, and the hash of every component's weights."""

    clip: CLIPFeatures | None
    vae: AutoencoderKL | None
    pipeline: Pipeline | None
    inception: InceptionFeatures | None
    device: torch.device
    hashes: dict[str, Any]


@dataclass
class Gathered:
    """What was measured on images, real or generated, in the order of the samples (N of them)."""

    captions: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    metadata: list[dict[str, Any]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    image_features: list[Tensor] = field(default_factory=list)
    text_features: list[Tensor] = field(default_factory=list)
    inception_features: list[Tensor] = field(default_factory=list)
    """Those of `needed_taps`, side by side."""
    psnr: list[Tensor] = field(default_factory=list)
    ssim: list[Tensor] = field(default_factory=list)
    scenes: list[SeenScene] = field(default_factory=list)


def needed_folders(config: EvalSection) -> dict[str, str]:
    """`clip`, `vae`, `pipeline` → the folder that the recipe gives, for the models that its metrics need."""
    used = {name for name, metrics in _METRICS_BY_MODEL.items() if metrics & set(config.metrics)}
    return {name: folder for name in _METRICS_BY_MODEL if (folder := getattr(config, name)) and name in used}


def load_models(config: EvalSection, device: torch.device) -> Models:
    """The models that the metrics need, and no others."""
    folders, hashes = needed_folders(config), dict[str, Any]()
    clip, vae, pipeline = None, None, None
    if "clip" in folders:
        folder = resolve_model(Path(folders["clip"]))
        clip = CLIPFeatures.load(folder, device)
        hashes["clip"] = {"folder": str(folder), "sha256": weights_sha256(folder)}
    if "vae" in folders:
        folder = resolve_model(Path(folders["vae"]))
        vae = load_model(AutoencoderKL, folder)
        place(device, torch.float32, vae)
        hashes["vae"] = {"folder": str(folder), "sha256": weights_sha256(folder)}
    if "pipeline" in folders:
        sampling = config.sampling
        family = open_family(Path(folders["pipeline"]), device, sampling.precision, compiled=sampling.compile)
        pipeline = Pipeline(family)
        hashes["pipeline"] = {"folder": str(family.folder), "sha256": family.weights_sha256}
    inception = None
    if config.inception is not None and needed_taps(config.picture_metrics):
        inception = InceptionFeatures.load(Path(config.inception), device, config.preprocessing)
        hashes["inception"] = inception.provenance
    return Models(clip, vae, pipeline, inception, device, hashes)


def measure_real(recipe: EvalRecipe, shards: ShardSet, models: Models, reporter: Reporter) -> Gathered:
    """The first samples of the shards: as many as the metrics or the drawing ask for."""
    config, gathered = recipe.eval, Gathered()
    labelled = "zero_shot" in config.metrics and any(task.label == "cls" for task in config.zero_shot)
    data = recipe.data.model_copy(update={"label": "cls"}) if labelled else recipe.data
    limit = max(config.num_samples, config.num_generated if models.pipeline is not None else 0)
    total = min(limit, shards.num_samples)
    with reporter.progress("measuring samples", total, unit="sample") as progress:
        for batch in sequential_batches(shards, data, config.batch_size, limit, with_json=True):
            _add_real(gathered, batch, config, models)
            progress.update(len(gathered.keys))
    if not gathered.keys:
        raise DataError(f"no usable sample in '{recipe.data.shards}'")
    return gathered


def _add_real(gathered: Gathered, batch: Batch, config: EvalSection, models: Models) -> None:
    gathered.captions += batch.captions
    gathered.keys += batch.keys
    gathered.metadata += batch.metadata or []
    gathered.labels += batch.labels.tolist() if batch.labels is not None else []
    if models.clip is not None:
        gathered.image_features.append(models.clip.images(batch.images))
        gathered.text_features.append(models.clip.texts(batch.captions))
    _add_inception_features(gathered, batch.images, config, models)
    if models.vae is not None:
        again = _reconstructed(models.vae, batch.images.to(models.device)).cpu()
        gathered.psnr.append(psnr(again, batch.images))
        gathered.ssim.append(ssim(again, batch.images))
    if "attribute_accuracy" in config.metrics:
        gathered.scenes += read_scenes(batch.images)


@torch.inference_mode()
def _reconstructed(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] through the latent's mean and back.

    Raises:
        DivergedError: a reconstruction is not finite.
    """
    again = vae.decode(vae.encode(to_signed(images, images.device)))
    if not bool(is_sound(again).all()):
        raise DivergedError("the reconstructions of eval.vae are not finite", remedy="give another autoencoder")
    return to_bytes(again)


def measure_generated(config: EvalSection, real: Gathered, models: Models, reporter: Reporter) -> Gathered:
    """A picture for each of the first captions, measured and dropped."""
    gathered = Gathered(captions=real.captions[: config.num_generated])
    with_scenes = "attribute_accuracy" in config.metrics
    for images in _generated(config, gathered.captions, models, reporter):
        if models.clip is not None:
            gathered.image_features.append(models.clip.images(images))
        _add_inception_features(gathered, images, config, models)
        if with_scenes:
            gathered.scenes += read_scenes(images)
    return gathered


def _add_inception_features(gathered: Gathered, images: Tensor, config: EvalSection, models: Models) -> None:
    if models.inception is not None:
        taps = needed_taps(config.picture_metrics)
        found = models.inception(images, taps)
        gathered.inception_features.append(torch.cat([found[tap] for tap in taps], 1).cpu())


def picture_features(config: EvalSection, gathered: Gathered, count: int, device: torch.device) -> PictureFeatures:
    """The first `count` pictures' features for the metrics of `PICTURE_METRICS`."""
    features, found = PictureFeatures(config.picture_metrics, device), dict[str, Tensor]()
    if taps := needed_taps(config.picture_metrics):
        parts = torch.split(torch.cat(gathered.inception_features)[:count], [NUM_FEATURES[tap] for tap in taps], 1)
        found |= dict(zip(taps, parts, strict=True))
    if "cmmd" in config.metrics:
        found[CLIP] = torch.cat(gathered.image_features)[:count]
    features.add(found)
    return features


def _generated(config: EvalSection, captions: list[str], models: Models, reporter: Reporter) -> Iterator[Tensor]:
    """Batches of pictures, uint8 [B, 3, H, W], one picture per caption."""
    assert models.pipeline is not None
    requests = [ImageRequest(caption, config.sampling.seed + i) for i, caption in enumerate(captions)]
    # In portions, because text states of all prompts at once would not fit for tens of thousands of them.
    for start in range(0, len(requests), _REQUESTS_PER_CALL):
        portion = requests[start : start + _REQUESTS_PER_CALL]
        batch: list[Tensor] = []
        for picture in models.pipeline.generate(portion, config.sampling, reporter=reporter):
            batch.append(picture.pixels)
            if len(batch) == config.batch_size or picture.index == len(portion) - 1:
                yield torch.stack(batch)
                batch = []
