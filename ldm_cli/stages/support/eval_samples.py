"""What `ldm eval` measures: one pass over real images, one over pictures that are generated for their captions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_cli.core.models.inception import NUM_FEATURES
from ldm_cli.core.pixels import to_bytes, to_signed
from ldm_cli.data.batch import Batch
from ldm_cli.data.loader import sequential_batches
from ldm_cli.data.shards import ShardSet
from ldm_cli.data.to_device import sent_to_device
from ldm_cli.errors import DataError, DivergedError
from ldm_cli.evaluation.clip_features import CLIPFeatures
from ldm_cli.evaluation.config import PICTURE_METRICS
from ldm_cli.evaluation.image_quality import psnr, ssim
from ldm_cli.evaluation.inception_features import InceptionFeatures
from ldm_cli.evaluation.picture_metrics import CLIP, PictureFeatures, needed_taps
from ldm_cli.evaluation.scene_detector import SeenObject, SeenScene, read_scenes
from ldm_cli.families.codec_folder import Autoencoder, open_codec
from ldm_cli.families.family import place
from ldm_cli.families.open_family import open_family, resolve_model
from ldm_cli.formats.hub import recorded
from ldm_cli.formats.model_source import weights_sha256
from ldm_cli.recipe.schema import EvalRecipe, EvalSection
from ldm_cli.reporting import Reporter
from ldm_cli.sampling.pipeline import Pipeline
from ldm_cli.sampling.pixels import is_sound
from ldm_cli.sampling.request import ImageRequest
from ldm_cli.training.ranks import Ranks
from ldm_cli.training.shared_work import merged

_METRICS_BY_MODEL = {
    "clip": {"clip_score", "zero_shot", "linear_probe", "retrieval", "frechet_distance", "cmmd"},
    "vae": {"reconstruction"},
    "pipeline": {"clip_score", "frechet_distance", "attribute_accuracy", *PICTURE_METRICS},
}
_REQUESTS_PER_CALL = 256
_MEASURED = ("image_features", "text_features", "inception_features", "psnr", "ssim")


@dataclass(frozen=True)
class Models:
    """What the metrics of a recipe need, and the hash of every component's weights."""

    clip: CLIPFeatures | None
    vae: Autoencoder | None
    pipeline: Pipeline | None
    inception: InceptionFeatures | None
    device: torch.device
    hashes: dict[str, Any]


@dataclass
class Gathered:
    """Measurements of images, real or generated, in the order of the samples (N of them).

    The ranks take turns in measuring batches; `share` gives all of them the measurements of all.
    """

    ranks: Ranks
    num_batches: int = 0
    """Batches so far, of all ranks."""
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
    scenes_by_batch: list[list[SeenScene]] = field(default_factory=list)

    @property
    def scenes(self) -> list[SeenScene]:
        """The scenes of all batches."""
        return [scene for scenes in self.scenes_by_batch for scene in scenes]

    def share(self) -> None:
        """Exchange the measurements; all ranks call."""
        numbers = range(self.ranks.rank, self.num_batches, self.ranks.world_size)
        own = {
            f"{name} {number}": tensor
            for name in _MEASURED
            for number, tensor in zip(numbers, getattr(self, name), strict=False)
        }
        every = merged(own, self.ranks)
        for name in _MEASURED:
            names = [f"{name} {number}" for number in range(self.num_batches)]
            setattr(self, name, [every[name] for name in names if name in every])
        texts = self.ranks.texts(json.dumps([[asdict(scene) for scene in scenes] for scenes in self.scenes_by_batch]))
        turns = zip_longest(*map(json.loads, texts), fillvalue=())
        self.scenes_by_batch = [[_as_scene(scene) for scene in batch] for turn in turns for batch in turn]


def _as_scene(fields: dict[str, Any]) -> SeenScene:
    objects = tuple(SeenObject(**{**seen, "center": tuple(seen["center"])}) for seen in fields["objects"])
    return SeenScene(**{**fields, "objects": objects})


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
        hashes["clip"] = {"folder": recorded(folder), "sha256": weights_sha256(folder)}
    if "vae" in folders:
        folder = resolve_model(Path(folders["vae"]))
        vae = open_codec(folder)
        place(device, torch.float32, vae)
        hashes["vae"] = {"folder": recorded(folder), "sha256": weights_sha256(folder)}
    if "pipeline" in folders:
        sampling = config.sampling
        family = open_family(Path(folders["pipeline"]), device, sampling.precision, compiled=sampling.compile is True)
        pipeline = Pipeline(family)
        assert family.folder is not None
        shown = {"folder": recorded(family.folder), "sha256": family.weights_sha256, "compile": sampling.compile}
        hashes["pipeline"] = shown
    inception = None
    if config.inception is not None and needed_taps(config.picture_metrics):
        inception = InceptionFeatures.load(Path(config.inception), device, config.preprocessing)
        hashes["inception"] = inception.provenance
    return Models(clip, vae, pipeline, inception, device, hashes)


def measure_real(recipe: EvalRecipe, shards: ShardSet, models: Models, reporter: Reporter, ranks: Ranks) -> Gathered:
    """The first samples of the shards: as many as the metrics or the generation ask for; all ranks call."""
    config, gathered = recipe.eval, Gathered(ranks)
    needs_labels = {"zero_shot", "linear_probe"} & set(config.metrics)
    labelled = needs_labels and any(task.label == "cls" for task in config.zero_shot)
    data = recipe.data.model_copy(update={"label": "cls"}) if labelled else recipe.data
    limit = max(config.num_samples, config.num_generated if models.pipeline is not None else 0)
    total = min(limit, shards.num_samples)
    with reporter.progress("measuring samples", total, unit="sample") as progress:
        batches = sequential_batches(shards, data, config.batch_size, limit, with_json=True)
        for batch in sent_to_device(batches, models.device):
            _add_real(gathered, batch, config, models)
            progress.update(len(gathered.keys))
    if not gathered.keys:
        raise DataError(f"no usable sample in '{recipe.data.shards}'")
    gathered.share()
    return gathered


def measure_probe(recipe: EvalRecipe, shards: ShardSet, models: Models, reporter: Reporter, ranks: Ranks) -> Gathered:
    """The training samples of the linear probe; all ranks call."""
    data = recipe.data.model_copy(update={"shards": recipe.eval.probe_shards})
    probe = {"metrics": ("linear_probe",), "num_samples": recipe.eval.num_probe_samples}
    own = recipe.model_copy(update={"data": data, "eval": recipe.eval.model_copy(update=probe)})
    return measure_real(own, shards, replace(models, vae=None, pipeline=None, inception=None), reporter, ranks)


def _add_real(gathered: Gathered, batch: Batch, config: EvalSection, models: Models) -> None:
    gathered.captions += batch.captions
    gathered.keys += batch.keys
    gathered.metadata += batch.metadata or []
    gathered.labels += batch.labels.tolist() if batch.labels is not None else []
    gathered.num_batches += 1
    if (gathered.num_batches - 1) % gathered.ranks.world_size != gathered.ranks.rank:
        return
    if models.clip is not None:
        gathered.image_features.append(models.clip.images(batch.images))
        if {"clip_score", "retrieval"} & set(config.metrics):
            gathered.text_features.append(models.clip.texts(batch.captions))
    _add_inception_features(gathered, batch.images, config, models)
    if models.vae is not None:
        again = _reconstructed(models.vae, batch.images)
        gathered.psnr.append(psnr(again, batch.images).cpu())
        gathered.ssim.append(ssim(again, batch.images).cpu())
    if "attribute_accuracy" in config.metrics:
        gathered.scenes_by_batch.append(read_scenes(batch.images.cpu()))


@torch.inference_mode()
def _reconstructed(vae: Autoencoder, images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] through the latent's mean and back.

    Raises:
        DivergedError: a reconstruction is not finite.
    """
    again = vae.decode(vae.encode(to_signed(images, images.device)))
    if not bool(is_sound(again).all()):
        raise DivergedError("the reconstructions of eval.vae are not finite", remedy="give another autoencoder")
    return to_bytes(again)


def measure_generated(config: EvalSection, real: Gathered, models: Models, reporter: Reporter) -> Gathered:
    """A picture for each of the first captions, measured and dropped; all ranks call."""
    gathered = Gathered(real.ranks, captions=real.captions[: config.num_generated])
    gathered.num_batches = -(-len(gathered.captions) // config.batch_size)
    with_scenes = "attribute_accuracy" in config.metrics
    for images in _generated(config, gathered, models, reporter):
        if models.clip is not None:
            gathered.image_features.append(models.clip.images(images))
        _add_inception_features(gathered, images, config, models)
        if with_scenes:
            gathered.scenes_by_batch.append(read_scenes(images))
    gathered.share()
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


def _generated(config: EvalSection, gathered: Gathered, models: Models, reporter: Reporter) -> Iterator[Tensor]:
    """This rank's batches of pictures, uint8 [B, 3, H, W], one picture per caption."""
    assert models.pipeline is not None
    requests = [ImageRequest(caption, config.sampling.seed + i) for i, caption in enumerate(gathered.captions)]
    ranks, size = gathered.ranks, config.batch_size
    batches = [requests[start : start + size] for start in range(0, len(requests), size)][
        ranks.rank :: ranks.world_size
    ]
    # In portions, because text states of all prompts at once would not fit for tens of thousands of them.
    num_together = max(1, _REQUESTS_PER_CALL // size)
    for start in range(0, len(batches), num_together):
        portion = [request for batch in batches[start : start + num_together] for request in batch]
        pictures = models.pipeline.generate(portion, config.sampling, reporter=reporter)
        for batch in batches[start : start + num_together]:
            yield torch.stack([picture.pixels for picture in islice(pictures, len(batch))])
