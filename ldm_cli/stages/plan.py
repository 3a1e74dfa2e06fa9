"""`--dry-run`: what a recipe would take, found out without allocating or training anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm_cli.core.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from ldm_cli.core.models.clip import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel
from ldm_cli.core.models.patch_discriminator import PatchDiscriminator
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionConfig, UNet2DConditionModel
from ldm_cli.data.config import DataConfig
from ldm_cli.data.shards import open_shards
from ldm_cli.errors import InputNotFoundError
from ldm_cli.formats.model_folder import CONFIG_NAME, read_config
from ldm_cli.formats.pipeline_folder import INDEX_NAME
from ldm_cli.recipe.schema import (
    EvalRecipe,
    Recipe,
    SampleRecipe,
    TrainClipRecipe,
    TrainUnetRecipe,
    TrainVaeRecipe,
)
from ldm_cli.reporting import Reporter
from ldm_cli.sampling.components import resolve_model
from ldm_cli.stages.train_unet import fitted_config
from ldm_cli.training.config import TrainConfig

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def plan(recipe: Recipe, reporter: Reporter) -> dict[str, Any]:
    """Parameters, memory, shards and epochs of `recipe`; models are built on the meta device.

    Returns:
        `recipe` (every field), `parameters` (module → count), `bytes` (what stays in memory, activations not
        counted: `weights`, `gradients`, `optimizer`, `ema`), and where they apply `shards`,
        `steps_per_epoch`, `epochs`, `images`; `notes` says what could not be found yet.

    Raises:
        RecipeError: the models that the recipe names do not fit together.
    """
    notes: list[str] = []
    result: dict[str, Any] = {"recipe": recipe.to_mapping()}
    if isinstance(recipe, SampleRecipe):
        parameters = _pipeline("model", recipe.model, notes)
        result |= _memory(parameters, _BYTES[recipe.sampling.precision])
        result["images"] = len(recipe.prompts) * recipe.sampling.images_per_prompt
    elif isinstance(recipe, EvalRecipe):
        result |= _memory(_evaluated(recipe, notes))
        result |= _shards(recipe.data, notes, reporter)
    else:
        trained, frozen = _trainer_modules(recipe, notes)
        result |= _training_memory(trained, frozen, recipe.train)
        result |= _shards(recipe.data, notes, reporter)
        result |= _epochs(recipe.train, result)
    return result | {"notes": notes}


def count_parameters(module: nn.Module) -> int:
    """Number of weights of a module, buffers left out."""
    return sum(parameter.numel() for parameter in module.parameters())


def _on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def _trainer_modules(
    recipe: TrainClipRecipe | TrainVaeRecipe | TrainUnetRecipe, notes: list[str]
) -> tuple[dict[str, int], dict[str, int]]:
    """Parameters of the modules that are trained, and of those that are only used."""
    if isinstance(recipe, TrainClipRecipe):
        if recipe.tokenizer.path is None:
            notes.append("clip: the trained vocabulary may have fewer tokens than text_config.vocab_size")
        return {"clip": count_parameters(_on_meta(lambda: CLIPModel(recipe.clip)))}, {}
    if isinstance(recipe, TrainVaeRecipe):
        return _autoencoder_modules(recipe, notes)
    vae = _model_at("vae", recipe.vae, _autoencoder, notes)
    text_encoder = _model_at("text_encoder", recipe.text_encoder, _text_encoder, notes)
    config = recipe.unet
    if isinstance(vae, AutoencoderKL) and isinstance(text_encoder, CLIPTextModel):
        config = fitted_config(recipe, vae, text_encoder.config.hidden_size)
    unet = _on_meta(lambda: UNet2DConditionModel(config))
    found = {"vae": vae, "text_encoder": text_encoder}
    return {"unet": count_parameters(unet)}, {n: count_parameters(m) for n, m in found.items() if m is not None}


def _autoencoder_modules(recipe: TrainVaeRecipe, notes: list[str]) -> tuple[dict[str, int], dict[str, int]]:
    trained = {"vae": count_parameters(_on_meta(lambda: AutoencoderKL(recipe.vae)))}
    loss, frozen = recipe.loss, {}
    if loss.adversarial_weight > 0:
        build = lambda: PatchDiscriminator(loss.discriminator_channels, loss.discriminator_layers)  # noqa: E731
        trained["discriminator"] = count_parameters(_on_meta(build))
    if loss.perceptual_clip is not None:
        clip = _model_at("loss.perceptual_clip", loss.perceptual_clip, _clip, notes)
        if isinstance(clip, CLIPModel):
            frozen["perceptual_clip"] = count_parameters(clip.vision_model)
    return trained, frozen


def _model_at(
    field: str, folder: str, build: Callable[[Mapping[str, Any]], nn.Module], notes: list[str]
) -> nn.Module | None:
    """The model of a folder without its weights; a missing one is noted."""
    if not (Path(folder) / CONFIG_NAME).is_file():
        notes.append(f"{field}: no model in '{folder}' yet")
        return None
    config = read_config(Path(folder))
    try:
        return _on_meta(lambda: build(config))
    except ValueError as error:
        notes.append(f"{field}: '{folder}' cannot be used: {str(error).splitlines()[0]}")
        return None


def _autoencoder(mapping: Mapping[str, Any]) -> AutoencoderKL:
    return AutoencoderKL(AutoencoderKLConfig.from_hugging_face(mapping))


def _clip(mapping: Mapping[str, Any]) -> CLIPModel:
    return CLIPModel(CLIPConfig.from_hugging_face(mapping))


def _text_encoder(mapping: Mapping[str, Any]) -> CLIPTextModel:
    if "text_config" in mapping:
        return CLIPTextModel(CLIPConfig.from_hugging_face(mapping).text_config)
    return CLIPTextModel(CLIPTextConfig.from_hugging_face(mapping))


def _unet(mapping: Mapping[str, Any]) -> UNet2DConditionModel:
    return UNet2DConditionModel(UNet2DConditionConfig.from_hugging_face(mapping))


def _pipeline(field: str, folder: str, notes: list[str]) -> dict[str, int]:
    """Parameters of a pipeline folder's models."""
    try:
        root = resolve_model(Path(folder))
    except InputNotFoundError as error:
        notes.append(f"{field}: {error.what}")
        return {}
    if not (root / INDEX_NAME).is_file():
        notes.append(f"{field}: '{root}' is not a whole pipeline")
        return {}
    builders: dict[str, Callable[[Mapping[str, Any]], nn.Module]] = {
        "unet": _unet,
        "vae": _autoencoder,
        "text_encoder": _text_encoder,
    }
    found = {name: _model_at(f"{field}.{name}", str(root / name), build, notes) for name, build in builders.items()}
    return {name: count_parameters(module) for name, module in found.items() if module is not None}


def _evaluated(recipe: EvalRecipe, notes: list[str]) -> dict[str, int]:
    parameters = {}
    if recipe.eval.clip is not None and (clip := _model_at("eval.clip", recipe.eval.clip, _clip, notes)):
        parameters["clip"] = count_parameters(clip)
    if recipe.eval.vae is not None and (vae := _model_at("eval.vae", recipe.eval.vae, _autoencoder, notes)):
        parameters["vae"] = count_parameters(vae)
    if recipe.eval.pipeline is not None:
        inside = _pipeline("eval.pipeline", recipe.eval.pipeline, notes)
        parameters |= {f"pipeline.{name}": count for name, count in inside.items()}
    return parameters


def _memory(parameters: dict[str, int], bytes_each: int = 4) -> dict[str, Any]:
    return {"parameters": parameters, "bytes": {"weights": bytes_each * sum(parameters.values())}}


def _training_memory(trained: dict[str, int], frozen: dict[str, int], train: TrainConfig) -> dict[str, Any]:
    """Weights and optimizer state stay in fp32; AdamW keeps two numbers per trained weight."""
    num_trained = sum(trained.values())
    num_averaged = sum(count for name, count in trained.items() if name != "discriminator")
    sizes = {
        "weights": 4 * (num_trained + sum(frozen.values())),
        "gradients": 4 * num_trained,
        "optimizer": 8 * num_trained,
        "ema": 4 * num_averaged if train.ema_decay is not None else 0,
    }
    return {"parameters": trained | frozen, "bytes": sizes}


def _shards(data: DataConfig, notes: list[str], reporter: Reporter) -> dict[str, Any]:
    """What is in the shards, as far as they exist."""
    counts: dict[str, int] = {}
    for prefix, pattern in (("", data.shards), ("val_", data.val_shards)):
        if pattern is None:
            continue
        try:
            shards = open_shards(pattern, data, reporter)
        except InputNotFoundError as error:
            notes.append(f"data.{prefix}shards: {error.what}: {error.cause}")
            continue
        counts[f"num_{prefix}shards"] = len(shards.paths)
        counts[f"num_{prefix}samples"] = shards.num_samples
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
