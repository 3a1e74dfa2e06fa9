"""The metrics of `ldm eval`, computed from what was measured of real and of generated pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm_cli.data.captions import field_of
from ldm_cli.errors import DataError
from ldm_cli.evaluation.attribute_accuracy import score_scenes
from ldm_cli.evaluation.clip_features import CLIPFeatures
from ldm_cli.evaluation.config import ZeroShotClassification
from ldm_cli.evaluation.frechet import frechet_distance, frechet_name
from ldm_cli.evaluation.linear_probe import linear_probe
from ldm_cli.evaluation.metrics import class_embeddings, retrieval_recall, summarize_clip_score, zero_shot_accuracy
from ldm_cli.evaluation.picture_metrics import (
    CLIP,
    POOLED,
    RECONSTRUCTED,
    expect_enough_vectors,
    frechet_of,
    measure_pictures,
)
from ldm_cli.recipe.eval_section import EvalSection
from ldm_cli.stages.support.eval_models import Models
from ldm_cli.stages.support.eval_samples import COSINE, TEXTS, Measurements, RealSamples


def metrics_of_real(
    config: EvalSection, models: Models, real: RealSamples, probe: RealSamples | None, warn: Callable[[str], None]
) -> dict[str, Any]:
    """What the first `num_samples` samples tell by themselves, by metric; the linear probe is fitted to `probe`.

    Raises:
        DataError: labels are missing or unknown, or there are too few samples for a metric.
    """
    measured, count = real.measured, min(config.num_samples, len(real.keys))
    result: dict[str, Any] = {}
    if "clip_score" in config.metrics:
        result["clip_score"] = {"real": summarize_clip_score(measured.kept(COSINE))}
    tasks = [_with_classes(task, [real] if probe is None else [probe, real]) for task in config.zero_shot]
    if "zero_shot" in config.metrics and models.clip is not None:
        images = measured.kept(CLIP)
        result["zero_shot"] = {task.name: _zero_shot(task, models.clip, images, real) for task in tasks}
    if probe is not None:
        result["linear_probe"] = {task.name: _linear_probe(task, probe, real) for task in tasks}
    if "retrieval" in config.metrics:
        captions = real.captions[:count]
        recall = retrieval_recall(measured.kept(CLIP), measured.kept(TEXTS), captions)
        result["retrieval"] = {**recall, "num_samples": count, "num_captions": len(set(captions))}
    if "reconstruction" in config.metrics:
        means = {name: float(measured.kept(name).mean()) for name in ("psnr", "ssim")}
        result["reconstruction"] = {**means, "num_samples": count}
    if "lpips" in config.metrics:
        result["lpips"] = {"lpips": float(measured.kept("lpips").mean()), "num_samples": count}
    if "rfid" in config.metrics:
        # Without an interval: the two sets are not independent, as that of `frechet_estimates` takes them to be.
        made, own = (measured.features.moments[name] for name in (RECONSTRUCTED, POOLED))
        expect_enough_vectors(made, "reconstructed", "rfid", warn)
        result["rfid"] = {"rfid": frechet_distance(made.whole.gaussian, own.whole.gaussian), "num_samples": count}
    if "attribute_accuracy" in config.metrics:
        # How well real images of the same samples are read, in everything: how far to trust the generated ones' rates.
        truths = real.metadata[: config.num_generated]
        result["attribute_accuracy"] = {"detector": score_scenes(measured.scenes[: len(truths)], truths)}
    return result


def metrics_of_generated(
    config: EvalSection, models: Models, real: RealSamples, generated: Measurements, warn: Callable[[str], None]
) -> dict[str, Any]:
    """What the pictures of one model tell, beside the real samples, by metric.

    Raises:
        DataError: there are too few pictures for a metric.
    """
    result: dict[str, Any] = {}
    counts = {"num_real": real.measured.features.count, "num_generated": generated.features.count}
    if "clip_score" in config.metrics:
        result["clip_score"] = {"generated": summarize_clip_score(generated.kept(COSINE))}
    if "frechet_distance" in config.metrics:
        name = frechet_name(models.provenance["clip"]["sha256"])
        found = frechet_of(CLIP, name, generated.features, real.measured.features, warn)
        result["frechet_distance"] = {**found, **counts}
    found_by_metric = measure_pictures(config.picture_metrics, generated.features, real.measured.features, warn)
    result |= {name: {**values, **counts} for name, values in found_by_metric.items()}
    if "attribute_accuracy" in config.metrics:
        truths = real.metadata[: len(generated.scenes)]
        scores = score_scenes(generated.scenes, truths, stated_only=True)
        result["attribute_accuracy"] = {"generated": scores}
    return result


def check_truths(real: RealSamples, num_generated: int) -> None:
    """Refuse samples without a scene's truth before pictures are generated.

    Raises:
        DataError: naming the first one.
    """
    for key, truth in zip(real.keys[:num_generated], real.metadata, strict=False):
        if not {"objects", "stated", "relation", "background", "held_out"} <= truth.keys():
            raise DataError(
                f"attribute_accuracy cannot be measured on sample '{key}'",
                "its json member is not the truth of a synthetic scene",
                "take shards of `ldm data synth`, or leave the metric out",
            )


def _with_classes(task: ZeroShotClassification, samples: Sequence[RealSamples]) -> ZeroShotClassification:
    """The task with class names, sorted, from the samples, if it has none of its own.

    Raises:
        DataError: the samples have fewer than two.
    """
    if task.classes:
        return task
    place = task.label.removeprefix("json:")
    found = (field_of(metadata, place) for real in samples for metadata in real.metadata)
    names = sorted({name for name in found if isinstance(name, str)})
    if len(names) < 2:
        raise DataError(
            f"task '{task.name}' of eval.zero_shot cannot be measured",
            f"the samples have {len(names)} different texts at '{task.label}', expected at least 2",
            "name its classes, or pack the data again with ldm data pack",
        )
    return task.model_copy(update={"classes": tuple(names)})


def _zero_shot(task: ZeroShotClassification, clip: CLIPFeatures, images: Tensor, real: RealSamples) -> dict[str, Any]:
    prompts = [template.replace("{}", name) for name in task.classes for template in task.templates]
    classes = class_embeddings(clip.texts(prompts).view(len(task.classes), len(task.templates), -1))
    known, labels = _labels(task, real, len(images))
    accuracy = zero_shot_accuracy(images[known], classes, labels)
    return {**accuracy, "num_samples": len(known), "num_classes": len(task.classes)}


def _linear_probe(task: ZeroShotClassification, train: RealSamples, real: RealSamples) -> dict[str, Any]:
    features, own_features = train.measured.kept(CLIP), real.measured.kept(CLIP)
    known, labels = _labels(task, train, len(features))
    own, truths = _labels(task, real, len(own_features))
    accuracy = linear_probe(features[known], labels, own_features[own], truths)
    return {**accuracy, "num_samples": len(own), "num_classes": len(task.classes)}


def _labels(task: ZeroShotClassification, real: RealSamples, count: int) -> tuple[list[int], Tensor]:
    """Those of the first `count` samples that have a class, and their classes."""
    labels = [_label(task, real, i) for i in range(count)]
    known = [i for i, label in enumerate(labels) if label is not None]
    if not known:
        raise DataError(
            f"task '{task.name}' of eval.zero_shot cannot be measured",
            f"none of {len(labels)} samples has '{task.label}'",
            "correct eval.zero_shot",
        )
    return known, torch.tensor([labels[i] for i in known])


def _label(task: ZeroShotClassification, real: RealSamples, i: int) -> int | None:
    """The class index of a sample, None where it has none."""
    value = real.labels[i] if task.label == "cls" else field_of(real.metadata[i], task.label.removeprefix("json:"))
    if value is None:
        return None
    if isinstance(value, str) and value in task.classes:
        return task.classes.index(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(task.classes):
        return value
    raise DataError(
        f"sample '{real.keys[i]}' is of no class of the zero-shot task '{task.name}'",
        f"its '{task.label}' is {value!r:.80}",
        "correct eval.zero_shot",
    )
