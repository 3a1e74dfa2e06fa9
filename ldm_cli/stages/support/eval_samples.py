"""What `ldm eval` measures: one pass over real images, and one over the pictures generated for their captions."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm_cli.core.first_nonfinite import first_nonfinite
from ldm_cli.core.pixels import to_bytes, to_signed
from ldm_cli.data.batch import Batch
from ldm_cli.data.loader import sequential_batches
from ldm_cli.data.scene_vocabulary import COLORS, NEW_COLORS
from ldm_cli.data.shards import ShardSet
from ldm_cli.data.to_device import sent_to_device
from ldm_cli.errors import DataError, DivergedError
from ldm_cli.evaluation.config import MetricName
from ldm_cli.evaluation.image_quality import psnr, ssim
from ldm_cli.evaluation.metrics import clip_score
from ldm_cli.evaluation.picture_metrics import CLIP, DINOV2, POOLED, RECONSTRUCTED, PictureFeatures, needed_taps
from ldm_cli.evaluation.scene_detector import SeenObject, SeenScene, read_scenes
from ldm_cli.families.codec_folder import Autoencoder
from ldm_cli.pictures.progress import PartOfProgress
from ldm_cli.pictures.writer import Write, written_meanwhile
from ldm_cli.recipe.eval_section import EvalSection
from ldm_cli.recipe.schema import EvalRecipe
from ldm_cli.reporting import Reporter
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.picture_pipeline import PicturePipeline
from ldm_cli.sampling.pixels import is_sound
from ldm_cli.sampling.request import ImageRequest
from ldm_cli.stages.support.eval_models import Models, Pipelines
from ldm_cli.stages.support.rounds import Measured, measured_in_rounds
from ldm_cli.training.ranks import Ranks

COSINE, TEXTS = "cosine", "texts"
_SCENES, _NUM_TRUNCATED = "scenes", "num_truncated"
_KEPT_OF_REAL = {
    COSINE: {"clip_score"},
    CLIP: {"zero_shot", "linear_probe", "retrieval"},
    TEXTS: {"retrieval"},
    "psnr": {"reconstruction"},
    "ssim": {"reconstruction"},
    "lpips": {"lpips"},
}
"""Measurement that is kept of each picture → metrics that take it; distances need less."""
_LABELLED = {"zero_shot", "linear_probe"}
_PICTURES_PER_ROUND = 256


class Measurements:
    """Measurements of a set of pictures; only the first rank has any.

    Args:
        kept: names of the measurements that are kept of each picture.
        limit: number of pictures that count, but for scenes.

    Attributes:
        features: what the distances take.
        scenes: as they were read from all pictures.
        num_truncated: texts that were too long for the CLIP.
    """

    def __init__(
        self, metrics: Collection[MetricName], kept: Collection[str], limit: int, device: torch.device
    ) -> None:
        self.features = PictureFeatures(metrics, device)
        self.scenes: list[SeenScene] = []
        self.num_truncated, self._limit = 0, limit
        self._kept: dict[str, list[Tensor]] = {name: [] for name in kept}

    def add(self, found: Measured) -> None:
        """Count the next batch."""
        if _SCENES in found:
            self.scenes += [_as_scene(fields) for fields in json.loads(bytes(found.pop(_SCENES).tolist()))]
        self.num_truncated += int(found.pop(_NUM_TRUNCATED, torch.tensor(0)))
        room = self._limit - self.features.count
        if room <= 0 or not found:
            return
        counted = {name: values[:room] for name, values in found.items()}
        self.features.add(counted)
        for name, parts in self._kept.items():
            parts.append(counted[name])

    def kept(self, name: str) -> Tensor:
        """A measurement of every picture: [N, …]."""
        return torch.cat(self._kept[name])


@dataclass
class RealSamples:
    """The first samples of the shards: what the data say, and what was measured."""

    measured: Measurements
    captions: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    metadata: list[dict[str, Any]] = field(default_factory=list)
    """Empty where no metric takes it."""
    labels: list[int] = field(default_factory=list)


def _as_scene(fields: dict[str, Any]) -> SeenScene:
    objects = tuple(SeenObject(**{**seen, "center": tuple(seen["center"])}) for seen in fields["objects"])
    return SeenScene(**{**fields, "objects": objects})


def measure_real(
    recipe: EvalRecipe, shards: ShardSet, models: Models, reporter: Reporter, ranks: Ranks, folder: Path | None
) -> RealSamples:
    """The first samples of the shards: as many as the metrics or the generation ask for; all ranks call.

    Raises:
        DataError: there is no usable sample; other errors as in `sequential_batches` and `measured_in_rounds`.
    """
    config = recipe.eval
    kept = [name for name, metrics in _KEPT_OF_REAL.items() if metrics & set(config.metrics)]
    real = RealSamples(Measurements(config.metrics, kept, config.num_samples, models.device))
    limit = max(config.num_samples, config.num_generated if Pipelines.are_needed(config) else 0)

    def measure(batches: list[Batch]) -> Iterator[Measured]:
        return (_of_real(batch, config, models) for batch in sent_to_device((one for one in batches), models.device))

    with reporter.progress("measuring samples", min(limit, shards.num_samples), unit="sample") as progress:
        batches = _noted(_real_batches(recipe, shards, limit), real, config)
        for found in measured_in_rounds(batches, measure, ranks, _batches_per_round(config), folder):
            real.measured.add(found)
            progress.update(len(real.keys))
    if not real.keys:
        raise DataError(f"no usable sample in '{recipe.data.shards}'")
    return real


def measure_probe(
    recipe: EvalRecipe, shards: ShardSet, models: Models, reporter: Reporter, ranks: Ranks, folder: Path | None
) -> RealSamples:
    """The training samples of the linear probe; all ranks call, and errors are those of `measure_real`."""
    data = recipe.data.model_copy(update={"shards": recipe.eval.probe_shards})
    probe = {"metrics": ("linear_probe",), "num_samples": recipe.eval.num_probe_samples}
    own = recipe.model_copy(update={"data": data, "eval": recipe.eval.model_copy(update=probe)})
    return measure_real(own, shards, replace(models, vae=None, inception=None, dinov2=None), reporter, ranks, folder)


def _batches_per_round(config: EvalSection) -> int:
    return max(1, _PICTURES_PER_ROUND // config.batch_size)


def _real_batches(recipe: EvalRecipe, shards: ShardSet, limit: int) -> Iterator[Batch]:
    config = recipe.eval
    labelled = _LABELLED & set(config.metrics) and any(task.label == "cls" for task in config.zero_shot)
    data = recipe.data.model_copy(update={"label": "cls"}) if labelled else recipe.data
    return sequential_batches(shards, data, config.batch_size, limit, with_json=_takes_metadata(config))


def _takes_metadata(config: EvalSection) -> bool:
    return bool(({"attribute_accuracy"} | _LABELLED) & set(config.metrics))


def _noted(batches: Iterable[Batch], real: RealSamples, config: EvalSection) -> Iterator[Batch]:
    """The batches; what their data say is added to `real` as they pass."""
    for batch in batches:
        real.captions += batch.captions
        real.keys += batch.keys
        real.metadata += batch.metadata or []
        real.labels += batch.labels.tolist() if batch.labels is not None else []
        yield batch


def _of_real(batch: Batch, config: EvalSection, models: Models) -> Measured:
    found = _of_pictures(batch.images, batch.captions, config, models)
    if models.vae is not None:
        again = _reconstructed(models.vae, batch.images)
        if "reconstruction" in config.metrics:
            found |= {"psnr": psnr(again, batch.images).cpu(), "ssim": ssim(again, batch.images).cpu()}
        if models.lpips is not None:
            found["lpips"] = models.lpips(again, batch.images).cpu()
        if "rfid" in config.metrics and models.inception is not None:
            found[RECONSTRUCTED] = models.inception(again)[POOLED].cpu()
    return found


@torch.inference_mode()
def _reconstructed(vae: Autoencoder, images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] through the latent's mean and back.

    Raises:
        DivergedError: a reconstruction is not finite.
    """

    def reconstruct() -> Tensor:
        return vae.decode(vae.encode(to_signed(images, images.device)))

    again = reconstruct()
    if not bool(is_sound(again).all()):
        networks = {"vae": vae} if isinstance(vae, nn.Module) else {}
        origin = first_nonfinite(networks, reconstruct) or "the size of its numbers"
        cause = f"the first such value is in {origin}"
        raise DivergedError("the reconstructions of eval.vae are not finite", cause, "give another autoencoder")
    return to_bytes(again)


def _of_pictures(images: Tensor, captions: Sequence[str], config: EvalSection, models: Models) -> Measured:
    """The measurements of a batch that real and generated pictures have in common."""
    found: Measured = {}
    if models.clip is not None:
        before = models.clip.num_truncated
        found[CLIP] = models.clip.images(images)
        if {"clip_score", "retrieval"} & set(config.metrics):
            found[TEXTS] = models.clip.texts(captions)
            found[COSINE] = clip_score(found[CLIP], found[TEXTS])
        found[_NUM_TRUNCATED] = torch.tensor(models.clip.num_truncated - before)
    if models.inception is not None:
        taps = models.inception(images, needed_taps(config.metrics))
        found |= {name: features.cpu() for name, features in taps.items()}
    if models.dinov2 is not None:
        found[DINOV2] = models.dinov2(images).cpu()
    if "attribute_accuracy" in config.metrics:
        palette = COLORS | NEW_COLORS if config.new_colors else COLORS
        scenes = json.dumps([asdict(scene) for scene in read_scenes(images.cpu(), palette)])
        found[_SCENES] = torch.tensor(list(scenes.encode()), dtype=torch.uint8)
    return found


def measure_generated(
    config: EvalSection,
    sampling: SamplingConfig,
    captions: Sequence[str],
    pipeline: PicturePipeline,
    models: Models,
    reporter: Reporter,
    ranks: Ranks,
    folder: Path | None,
    keep: Write | None,
) -> Measurements:
    """A picture for each caption, measured, and kept by `keep` or dropped; all ranks call."""
    kept = [COSINE] if "clip_score" in config.metrics else []
    measured = Measurements(config.metrics, kept, len(captions), models.device)
    requests = [ImageRequest(caption, sampling.seed + i) for i, caption in enumerate(captions)]
    batches = [requests[i : i + config.batch_size] for i in range(0, len(requests), config.batch_size)]
    done = 0

    def measure(own: list[list[ImageRequest]]) -> Iterator[Measured]:
        # Together, because prompts and pictures of several batches share calls of the models.
        part = PartOfProgress(reporter, progress, done)
        pictures = _generated(pipeline, [request for batch in own for request in batch], sampling, part)
        with written_meanwhile(keep or _drop) as hand_over:  # written before their measurements are kept
            for batch in own:
                images = torch.stack(list(islice(pictures, len(batch))))
                for request, image in zip(batch, images, strict=True):
                    hand_over(request.seed - sampling.seed, image)
                yield _of_pictures(images, [request.prompt for request in batch], config, models)

    with reporter.progress("measuring pictures", len(requests), unit="image") as progress:
        for number, found in enumerate(measured_in_rounds(batches, measure, ranks, _batches_per_round(config), folder)):
            measured.add(found)
            done += len(batches[number])
            progress.update(done)
    return measured


def _drop(index: int, pixels: Tensor) -> None:
    """Keep no picture."""


def _generated(
    pipeline: PicturePipeline, requests: list[ImageRequest], sampling: SamplingConfig, reporter: Reporter
) -> Iterator[Tensor]:
    """Pictures uint8 [3, H, W]."""
    return (picture.pixels for picture in pipeline.generate(requests, sampling, reporter=reporter))
