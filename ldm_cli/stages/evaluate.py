"""`ldm eval`: metrics of trained models on shards.

One pass over the samples measures everything real, one pass over as many captions generates pictures and
measures those; then the metrics are computed from both. Pictures are never kept.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_cli.data.captions import field_of
from ldm_cli.data.open_shards import open_shards
from ldm_cli.data.shards import ShardSet
from ldm_cli.errors import DataError, DivergedError, OutputError, RecipeError
from ldm_cli.evaluation.attribute_accuracy import score_scenes
from ldm_cli.evaluation.clip_features import CLIPFeatures
from ldm_cli.evaluation.config import ZeroShotClassification
from ldm_cli.evaluation.frechet import Moments, frechet_distance, frechet_name
from ldm_cli.evaluation.image_quality import SSIM_WINDOW
from ldm_cli.evaluation.metrics import (
    class_embeddings,
    retrieval_recall,
    summarize_clip_score,
    zero_shot_accuracy,
)
from ldm_cli.evaluation.picture_metrics import measure_pictures
from ldm_cli.evaluation.scene_detector import WORKING_SIZE
from ldm_cli.formats.json_file import write_json
from ldm_cli.recipe.schema import EvalRecipe, EvalSection
from ldm_cli.reporting import Reporter
from ldm_cli.stages.support.eval_samples import (
    Gathered,
    Models,
    load_models,
    measure_generated,
    measure_real,
    picture_features,
)
from ldm_cli.stages.support.named_models import with_model_folders
from ldm_cli.stages.support.options import RunOptions, resolve_device, settled
from ldm_cli.training.distributed import SECONDS_OF_SILENCE, joined, local_rank
from ldm_cli.training.ranks import Ranks
from ldm_cli.training.run_folder import environment
from ldm_cli.training.run_identity import flatten

RESULT_NAME = "eval.json"


def run(recipe: EvalRecipe, options: RunOptions, reporter: Reporter) -> dict[str, Any]:
    """Measure the models of `recipe`.

    Returns:
        `metrics`: by name, each with the number of samples it was measured on; `provenance`: date, versions,
        hashes of the models' weights, fingerprint of the data, and every setting. Written to `options.out`
        too, where given: into `eval.json` of that folder, or the file itself where the name ends in `.json`.

    Raises:
        OutputError: if the results exist already and are not to be overwritten.
        InputNotFoundError, CheckpointError: if a model cannot be loaded.
        DataError: if the samples lack what a metric needs.
        DivergedError: if a model gives values that are not finite.
    """
    recipe = with_model_folders(recipe, reporter)
    target, device = _target(options), resolve_device(options.device, local_rank())
    with joined(device, SECONDS_OF_SILENCE) as ranks:
        result = _measured(recipe, device, reporter, ranks)
        if target is not None and ranks.is_first:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_json(target, result)
            reporter.info(f"results are in {target}")
    return result


def _measured(recipe: EvalRecipe, device: torch.device, reporter: Reporter, ranks: Ranks) -> dict[str, Any]:
    """The result of `run`; empty on all ranks but the first."""
    config = recipe.eval
    sampling = settled(config.sampling, config.num_generated, device, reporter.info)
    with ranks.first_then_others():
        shards = open_shards(recipe.data.shards, recipe.data, reporter)
    models = load_models(config.model_copy(update={"sampling": sampling}), device)
    _check_sizes(recipe, models)
    real = measure_real(recipe, shards, models, reporter, ranks)
    metrics = _metrics_of_real(config, models, real) if ranks.is_first else {}
    if "attribute_accuracy" in config.metrics:
        _check_truths(real, config.num_generated)
    generated = measure_generated(config, real, models, reporter) if models.pipeline is not None else None
    truncated = ranks.texts(str(models.clip.num_truncated if models.clip is not None else 0))
    if not ranks.is_first:
        return {}
    if generated is not None:
        for name, values in _metrics_of_generated(config, models, real, generated, reporter).items():
            metrics[name] = metrics.get(name, {}) | values
    if models.clip is not None and (num_cut := models.clip.num_truncated + sum(map(int, truncated[1:]))):
        reporter.warn(f"{num_cut} texts were too long for the CLIP and were cut")
    numbers = flatten(metrics)
    if bad := [name for name, value in numbers.items() if isinstance(value, float) and not math.isfinite(value)]:
        raise DivergedError(f"{', '.join(bad)} cannot be measured", "the values are not finite")
    return {
        "metrics": {name: metrics[name] for name in config.metrics},
        "provenance": _provenance(recipe, shards, models, real, generated),
    }


def _target(options: RunOptions) -> Path | None:
    if options.out is None:
        return None
    target = options.out if options.out.suffix == ".json" else options.out / RESULT_NAME
    if target.exists() and not options.overwrite:
        raise OutputError(f"'{target}' exists already", remedy="choose another --out, or pass --overwrite")
    return target


def _check_sizes(recipe: EvalRecipe, models: Models) -> None:
    """Refuse image sizes that a metric cannot use, before anything is measured.

    Raises:
        RecipeError: naming the size and what it should be.
    """
    size = recipe.data.image_size
    sizes = {"data.image_size": (size, size)}
    if models.pipeline is not None:
        sizes["eval.sampling"] = models.pipeline.image_size(recipe.eval.sampling)
    if models.vae is not None and (size % models.vae.factor or size < SSIM_WINDOW):
        raise RecipeError(
            f"reconstruction cannot be measured at data.image_size={size}",
            f"a multiple of {models.vae.factor}, at least {SSIM_WINDOW}, is needed",
        )
    for name, (height, width) in sizes.items():
        if "attribute_accuracy" in recipe.eval.metrics and (height != width or height < WORKING_SIZE):
            raise RecipeError(
                f"attribute_accuracy cannot be measured at {name}: {width}x{height}",
                f"squares of at least {WORKING_SIZE} pixels are needed",
            )


def _metrics_of_real(config: EvalSection, models: Models, real: Gathered) -> dict[str, Any]:
    """What the first `num_samples` samples tell by themselves."""
    count = min(config.num_samples, len(real.keys))
    result: dict[str, Any] = {}
    if models.clip is not None:
        images, texts = torch.cat(real.image_features)[:count], torch.cat(real.text_features)[:count]
        captions = real.captions[:count]
        if "clip_score" in config.metrics:
            result["clip_score"] = {"real": summarize_clip_score(images, texts)}
        if "zero_shot" in config.metrics:
            tasks = config.zero_shot
            result["zero_shot"] = {task.name: _zero_shot(task, models.clip, images, real) for task in tasks}
        if "retrieval" in config.metrics:
            recall = retrieval_recall(images, texts, captions)
            result["retrieval"] = {**recall, "num_samples": count, "num_captions": len(set(captions))}
    if "reconstruction" in config.metrics:
        result["reconstruction"] = {
            "psnr": float(torch.cat(real.psnr)[:count].mean()),
            "ssim": float(torch.cat(real.ssim)[:count].mean()),
            "num_samples": count,
        }
    return result


def _metrics_of_generated(
    config: EvalSection, models: Models, real: Gathered, generated: Gathered, reporter: Reporter
) -> dict[str, Any]:
    """What all the pictures tell, beside the real samples."""
    result: dict[str, Any] = {}
    if models.clip is not None:
        pictures = torch.cat(generated.image_features)
        if "clip_score" in config.metrics:
            texts = torch.cat(real.text_features)[: len(pictures)]
            result["clip_score"] = {"generated": summarize_clip_score(pictures, texts)}
        if "frechet_distance" in config.metrics:
            images = torch.cat(real.image_features)[: config.num_samples]
            result["frechet_distance"] = _frechet(images, pictures, models, reporter)
    if config.picture_metrics:
        ours = picture_features(config, generated, config.num_generated, models.device)
        theirs = picture_features(config, real, config.num_samples, models.device)
        counts = {"num_real": theirs.count, "num_generated": ours.count}
        found = measure_pictures(config.picture_metrics, ours, theirs, reporter.warn)
        result |= {name: {**values, **counts} for name, values in found.items()}
    if "attribute_accuracy" in config.metrics:
        truths = real.metadata[: len(generated.scenes)]
        result["attribute_accuracy"] = {
            "generated": score_scenes(generated.scenes, truths, stated_only=True),
            # How well real images of the same samples are read, in everything: how far to trust the above.
            "detector": score_scenes(real.scenes[: len(truths)], truths),
        }
    return result


def _zero_shot(task: ZeroShotClassification, clip: CLIPFeatures, images: Tensor, real: Gathered) -> dict[str, Any]:
    prompts = [template.replace("{}", name) for name in task.classes for template in task.templates]
    classes = class_embeddings(clip.texts(prompts).view(len(task.classes), len(task.templates), -1))
    labels = [_label(task, real, i) for i in range(len(images))]
    known = [i for i, label in enumerate(labels) if label is not None]
    if not known:
        raise DataError(
            f"zero-shot task '{task.name}' cannot be measured",
            f"none of {len(labels)} samples has '{task.label}'",
            "correct eval.zero_shot",
        )
    accuracy = zero_shot_accuracy(images[known], classes, torch.tensor([labels[i] for i in known]))
    return {**accuracy, "num_samples": len(known), "num_classes": len(task.classes)}


def _label(task: ZeroShotClassification, real: Gathered, i: int) -> int | None:
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


def _frechet(real: Tensor, generated: Tensor, models: Models, reporter: Reporter) -> dict[str, Any]:
    gaussians = []
    for name, features in (("real", real), ("generated", generated)):
        if len(features) <= features.shape[1]:
            reporter.warn(
                f"frechet_distance: {len(features)} {name} images for {features.shape[1]} features; "
                "compare only with distances of as many images"
            )
        gaussians.append(Moments.of(features).gaussian)
    assert models.clip is not None
    return {
        frechet_name(models.hashes["clip"]["sha256"]): frechet_distance(*gaussians),
        "num_real": len(real),
        "num_generated": len(generated),
        "num_features": real.shape[1],
    }


def _check_truths(real: Gathered, num_generated: int) -> None:
    """Refuse samples without a scene's truth before hours are spent on pictures."""
    for key, truth in zip(real.keys[:num_generated], real.metadata, strict=False):
        if not {"objects", "stated", "relation", "background", "held_out"} <= truth.keys():
            raise DataError(
                f"attribute_accuracy cannot be measured on sample '{key}'",
                "its json member is not the truth of a drawn scene",
                "take shards of `ldm data synth`, or leave the metric out",
            )


def _provenance(
    recipe: EvalRecipe, shards: ShardSet, models: Models, real: Gathered, generated: Gathered | None
) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(models.device),
        "device": str(models.device),
        "models": models.hashes,
        "data": {
            "shards": [path.name for path in shards.paths],
            "fingerprint": shards.fingerprint,
            "num_samples": min(recipe.eval.num_samples, len(real.keys)),
            "num_generated": len(generated.captions) if generated is not None else 0,
        },
        "recipe": recipe.to_mapping(),
    }
