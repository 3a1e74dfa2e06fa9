"""`--dry-run`: what a recipe would take, found out without allocating or training anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ldm_cli.core.models.inception import InceptionV3
from ldm_cli.core.precision import DTYPES, precision_on
from ldm_cli.data.config import DataConfig
from ldm_cli.data.open_shards import in_both, open_shards
from ldm_cli.data.shards import ShardSet
from ldm_cli.errors import InputNotFoundError
from ldm_cli.evaluation.dinov2_features import outline_dinov2
from ldm_cli.families.clip_folder import outline_clip
from ldm_cli.families.codec_folder import outline_codec
from ldm_cli.families.open_family import outline_family, resolve_model
from ldm_cli.formats.model_source import has_model_json
from ldm_cli.formats.pipeline_folder import INDEX_NAME
from ldm_cli.recipe.cascade_recipe import CascadeRecipe
from ldm_cli.recipe.sample_recipe import SampleRecipe
from ldm_cli.recipe.schema import EvalRecipe, Recipe
from ldm_cli.recipe.train_recipe import StartedRecipe
from ldm_cli.reporting import Reporter
from ldm_cli.stages import trainer_stage
from ldm_cli.stages.support.eval_models import Pipelines, needed_models
from ldm_cli.stages.support.memory_estimate import memory_estimate
from ldm_cli.stages.support.model_sizes import count_parameters, halved_models, model_at, outlined, training_bytes
from ldm_cli.stages.support.named_models import with_model_folders
from ldm_cli.stages.support.options import resolve_device
from ldm_cli.stages.support.start import resolve_start
from ldm_cli.training.config import TrainConfig


def dry_run(recipe: Recipe, reporter: Reporter, num_ranks: int = 1) -> dict[str, Any]:
    """Parameters, memory, shards and epochs of `recipe`; models are built on the meta device.

    Returns:
        `recipe` (every field), `parameters` (module → count), `bytes` (what stays in the memory of each rank,
        activations not counted: `weights`, `gradients`, `optimizer`, `ema`; `save`: in main memory, while rank 0 writes
        a checkpoint), of a trainer `memory` (`memory_estimate`), and where they apply `shards`, `steps_per_epoch`,
        `epochs`, `images`; `notes` says what could not be found yet, and what `bytes` leaves out.

    Raises:
        RecipeError: the models that the recipe names do not fit together, or the ranks cannot share the batch.
        CheckpointError: a model cannot be used.
    """
    notes: list[str] = []
    recipe = with_model_folders(recipe, reporter)
    result: dict[str, Any] = {"recipe": recipe.to_mapping()}
    if isinstance(recipe, SampleRecipe):
        parameters = _pipeline("model", recipe.model, notes) if recipe.model else {}
        if recipe.upscale is not None:
            upscaler = _pipeline("upscale.model", recipe.upscale.model, notes)
            parameters |= {f"upscaler's {name}": count for name, count in upscaler.items()}
        result |= _memory(parameters, DTYPES[precision_on(resolve_device("auto"), recipe.sampling.precision)].itemsize)
        result["images"] = len(recipe.prompts) * recipe.sampling.images_per_prompt
    elif isinstance(recipe, CascadeRecipe):
        stages = {f"stages[{number}].model": stage.model for number, stage in enumerate(recipe.stages)}
        found = {field: _pipeline(field, model, notes) for field, model in stages.items()}
        result |= _memory({f"{field}.{name}": n for field, own in found.items() for name, n in own.items()})
    elif isinstance(recipe, EvalRecipe):
        config = recipe.eval
        result |= _memory(_evaluated(recipe, notes))
        num_pipelines = len(Pipelines(config, config.sampling, resolve_device("cpu")).names)
        result["images"] = config.num_generated * len(config.sweep_points()) * num_pipelines
        result |= _shards(recipe.data, notes, reporter)
    else:
        if isinstance(recipe, StartedRecipe):
            recipe = resolve_start(recipe, notes.append)
            result["recipe"] = recipe.to_mapping()
        recipe.train.parts_per_rank(num_ranks)
        trained, frozen = trainer_stage(recipe.command).parameters(recipe, notes)
        sizes = training_bytes(trained, frozen, recipe.train, num_ranks, halved_models(recipe))
        memory = memory_estimate(recipe, sizes, sum(trained.values()), num_ranks)
        result |= {"parameters": trained | frozen, "bytes": sizes, "memory": memory}
        notes += _about_ranks(recipe.train, num_ranks)
        result |= _shards(recipe.data, notes, reporter)
        result |= _epochs(recipe.train, result)
    return result | {"notes": notes}


def _about_ranks(train: TrainConfig, num_ranks: int) -> list[str]:
    """Notes on the bytes of a sharded model."""
    if train.strategy != "sharded":
        return []
    if num_ranks == 1:
        return ["strategy=sharded: the bytes are those of one process; give --nproc"]
    return [
        f"strategy=sharded: the bytes are those of each of {num_ranks} ranks; rank 0 has the whole weights beside them "
        "while it saves, validates or generates pictures"
    ]


def _pipeline(field: str, folder: str, notes: list[str]) -> dict[str, int]:
    """Parameters of a pipeline folder's models."""
    if (root := model_at(field, folder, resolve_model, notes)) is None:
        return {}
    if not has_model_json(root / INDEX_NAME):
        notes.append(f"{field}: '{root}' is not a whole pipeline")
        return {}
    return {name: count_parameters(model) for name, model in outline_family(root).items()}


_OUTLINES: dict[str, Callable[[Path], nn.Module]] = {
    "clip": outline_clip,
    "dinov2": outline_dinov2,
    "vae": outline_codec,
}


def _evaluated(recipe: EvalRecipe, notes: list[str]) -> dict[str, int]:
    parameters: dict[str, int] = {}
    for field, folders in needed_models(recipe.eval).items():
        for name, folder in folders.items():
            place = f"eval.{field}" if field == name else f"eval.{field}.{name}"
            if field in ("pipeline", "pipelines"):
                parameters |= {f"{name}.{part}": count for part, count in _pipeline(place, folder, notes).items()}
            elif field in ("inception", "lpips"):
                if field == "inception":
                    parameters[name] = count_parameters(outlined(InceptionV3))
                if not Path(folder).is_file():
                    notes.append(f"{place}: '{folder}' not found")
            elif root := model_at(place, folder, resolve_model, notes):
                model = model_at(place, str(root), _OUTLINES[field], notes)
                if model is not None:
                    parameters[name] = count_parameters(model)
    return parameters


def _memory(parameters: dict[str, int], bytes_each: int = 4) -> dict[str, Any]:
    return {"parameters": parameters, "bytes": {"weights": bytes_each * sum(parameters.values())}}


def _shards(data: DataConfig, notes: list[str], reporter: Reporter) -> dict[str, Any]:
    """What is in the shards, as far as they exist."""
    counts: dict[str, int] = {}
    opened: list[ShardSet] = []
    for prefix, pattern in (("", data.shards), ("val_", data.val_shards)):
        if pattern is None:
            continue
        if data.stream and not prefix:
            notes.append("data.shards: a stream, whose samples are not counted")
            continue
        try:
            shards = open_shards(pattern, data, reporter)
        except InputNotFoundError as error:
            notes.append(f"data.{prefix}shards: {error.what}: {error.cause}")
            continue
        counts[f"num_{prefix}shards"] = len(shards.paths)
        counts[f"num_{prefix}samples"] = shards.num_samples
        opened.append(shards)
    if len(opened) == 2 and (remark := in_both(*opened)):
        notes.append(remark)
    return {"shards": counts} if counts else {}


def _epochs(train: TrainConfig, found: Mapping[str, Any]) -> dict[str, float]:
    """Epochs follow one another without a gap, so neither number need be whole."""
    num_samples = found.get("shards", {}).get("num_samples")
    if not num_samples:
        return {}
    return {
        "steps_per_epoch": round(num_samples / train.batch_size, 2),
        "epochs": round(train.steps * train.batch_size / num_samples, 3),
    }
