"""Training that begins at trained weights: what a recipe takes from `start_from`, and which parameters stay frozen."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from torch import nn

from ldm_cli.config import Config
from ldm_cli.core.models.autoencoder_kl_config import AutoencoderKLConfig
from ldm_cli.core.models.clip_config import CLIPConfig, CLIPTextConfig
from ldm_cli.core.models.llama_config import LlamaConfig
from ldm_cli.core.models.prior_transformer_config import PriorTransformerConfig
from ldm_cli.core.models.sd3_transformer_2d_config import SD3Transformer2DConfig
from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig
from ldm_cli.core.models.vq_model_config import VQModelConfig
from ldm_cli.data.tokenizer import Tokenizer
from ldm_cli.errors import CheckpointError, InputNotFoundError, RecipeError
from ldm_cli.families import pixel_diffusion, pixel_upscale
from ldm_cli.families.autoregressive import VQ
from ldm_cli.families.clip_t5_encoder import has_t5
from ldm_cli.families.clip_text_encoder import tokenizer_folder
from ldm_cli.families.label_encoder import class_names
from ldm_cli.families.latent_diffusion import read_settings
from ldm_cli.families.open_family import resolve_model
from ldm_cli.families.t5_encoder import t5_length_of
from ldm_cli.formats.model_folder import ModelClass, load_model, read_as
from ldm_cli.formats.model_source import has_model_json, read_model_json, split_at_file
from ldm_cli.formats.pipeline_folder import (
    IMAGE_ENCODER,
    INDEX_NAME,
    PRIOR,
    TEXT_ENCODER,
    TEXT_ENCODER_2,
    TEXT_ENCODER_3,
    TOKENIZER,
    TRANSFORMER,
    UNET,
    VAE,
)
from ldm_cli.formats.weight_files import CONFIG_NAME
from ldm_cli.recipe.ar_recipe import TrainArRecipe
from ldm_cli.recipe.prior_recipe import TrainPriorRecipe
from ldm_cli.recipe.schema import PIXELS, TrainClipRecipe, TrainUnetRecipe, TrainVaeRecipe
from ldm_cli.recipe.train_recipe import StartedRecipe
from ldm_cli.training.run_identity import flatten

RecipeT = TypeVar("RecipeT", bound=StartedRecipe)
ModuleT = TypeVar("ModuleT", bound=nn.Module)

# Sizes of pictures and latents, which follow from data.image_size.
_FREE = ("sample_size",)


def resolve_start(recipe: RecipeT, warn: Callable[[str], None]) -> RecipeT:
    """The recipe with the fields that it leaves out taken from `start_from`; without `start_from`, the recipe itself.

    The model's configuration is the folder's. A pipeline also gives `train-unet` its autoencoder, text encoder and
    process; a CLIP gives `train-clip` its tokenizer.

    Args:
        warn: receives a message for each given field of the process that differs from the pipeline's.

    Raises:
        InputNotFoundError, CheckpointError: the folder does not exist, or holds no model of this kind.
        RecipeError: the recipe contradicts the folder.
    """
    if recipe.start_from is None:
        return recipe
    folder = start_folder(recipe)
    try:
        filled = type(recipe).from_mapping(recipe.to_mapping() | _taken_fields(recipe, folder, warn))
    except ValidationError as error:
        problems = tuple(str(one["msg"]) for one in error.errors())
        raise RecipeError(f"the recipe does not fit '{folder}'", "; ".join(problems), problems=problems) from error
    return filled


def _taken_fields(recipe: StartedRecipe, folder: Path, warn: Callable[[str], None]) -> dict[str, Any]:
    if isinstance(recipe, TrainClipRecipe):
        clip = read_as(CLIPConfig.from_hugging_face, folder / CONFIG_NAME)
        tokenizer = {**recipe.tokenizer.to_mapping(), "path": str(_agreed_tokenizer(recipe, folder, clip.text_config))}
        return {"clip": _agreed("clip", recipe.clip, clip, folder), "tokenizer": tokenizer}
    if isinstance(recipe, TrainVaeRecipe):
        if read_model_json(folder / CONFIG_NAME).get("_class_name") == VQModelConfig.hugging_face_class:
            vq = read_as(VQModelConfig.from_hugging_face, folder / CONFIG_NAME)
            return {"vq": _agreed("vq", recipe.vq, vq, folder)}
        vae = read_as(AutoencoderKLConfig.from_hugging_face, folder / CONFIG_NAME)
        return {"vae": _agreed("vae", recipe.vae, vae, folder)}
    if isinstance(recipe, TrainArRecipe):
        return _taken_by_ar(recipe, folder)
    if isinstance(recipe, TrainPriorRecipe):
        prior = read_as(PriorTransformerConfig.from_hugging_face, folder / CONFIG_NAME)
        return {"prior": _agreed("prior", recipe.prior, prior, folder)}
    if not isinstance(recipe, TrainUnetRecipe):
        raise TypeError(f"start_from of a {type(recipe).__name__}")
    taken = _taken_denoiser(recipe, folder)
    if _is_pipeline(pipeline := folder.parent):
        names = [VAE, TEXT_ENCODER]
        if pixel_diffusion.is_mine(pipeline) or pixel_upscale.is_mine(pipeline):
            names, taken["vae"] = [], PIXELS
            if has_model_json(pipeline / TEXT_ENCODER / CONFIG_NAME):
                names.append(TEXT_ENCODER)
            if (rows := taken["unet"]["num_class_embeds"]) is not None:
                index = pipeline / INDEX_NAME
                taken["classes"] = recipe.classes or class_names(read_model_json(index), rows, index)
        if "transformer" in taken or taken["unet"]["addition_embed_type"] == "text_time":
            names.append(TEXT_ENCODER_2)
        if has_t5(pipeline):
            names.append(TEXT_ENCODER_3)
        if ("transformer" in taken or has_t5(pipeline)) and recipe.max_sequence_length is None:
            taken["max_sequence_length"] = t5_length_of(pipeline / TEXT_ENCODER)
        is_decoder = taken.get("unet", {}).get("class_embed_type") == "projection"
        if is_decoder and recipe.image_embedding is None and has_model_json(pipeline / IMAGE_ENCODER / CONFIG_NAME):
            taken["image_embedding"] = {"image_encoder": str(pipeline / IMAGE_ENCODER)}
        taken |= {name: getattr(recipe, name) or str(pipeline / name) for name in names}
        taken["diffusion"] = recipe.diffusion.to_mapping() | _process_defaults(recipe, pipeline, warn)
    return taken


def _taken_denoiser(recipe: TrainUnetRecipe, folder: Path) -> dict[str, Any]:
    """The configuration of the denoiser in a folder, under the field of its kind."""
    kind = read_model_json(folder / CONFIG_NAME).get("_class_name")
    if kind == SD3Transformer2DConfig.hugging_face_class and recipe.unet is None:
        transformer = read_as(SD3Transformer2DConfig.from_hugging_face, folder / CONFIG_NAME)
        return {"transformer": _agreed("transformer", recipe.transformer, transformer, folder)}
    if recipe.transformer is not None:
        raise RecipeError("the recipe contradicts start_from", f"'{folder}' is a {kind}", "leave transformer out")
    unet = read_as(UNet2DConditionConfig.from_hugging_face, folder / CONFIG_NAME)
    return {"unet": _agreed("unet", recipe.unet, unet, folder)}


def start_folder(recipe: StartedRecipe) -> Path:
    """The model folder that `start_from` means: of a run or checkpoint its model, of a pipeline the part to train.

    Raises:
        ValueError: the recipe has no `start_from`.
        InputNotFoundError: there is no such folder, or no model in it.
        CheckpointError: it is a pipeline without the part to train.
    """
    if recipe.start_from is None:
        raise ValueError("start_from is None")
    path = Path(recipe.start_from)
    if not path.exists() and split_at_file(path) is None:
        remedy = "give a model folder, a single file, a run or a checkpoint"
        raise InputNotFoundError(f"start_from: no folder '{recipe.start_from}'", remedy=remedy)
    root = resolve_model(path)
    if not _is_pipeline(root) or isinstance(recipe, TrainClipRecipe):
        return root
    parts: dict[type, str] = {TrainVaeRecipe: VAE, TrainArRecipe: TRANSFORMER, TrainPriorRecipe: PRIOR}
    part = parts.get(type(recipe), UNET)
    if part == UNET and has_model_json(root / TRANSFORMER / CONFIG_NAME):
        part = TRANSFORMER
    if not has_model_json(root / part / CONFIG_NAME):
        kind = read_model_json(root / INDEX_NAME).get("_class_name")
        raise CheckpointError(
            f"start_from: no {part} in '{root}'", f"it holds a {kind}", "give a pipeline that has one"
        )
    return root / part


def _taken_by_ar(recipe: TrainArRecipe, folder: Path) -> dict[str, Any]:
    config = read_as(LlamaConfig.from_hugging_face, folder / CONFIG_NAME)
    taken: dict[str, Any] = {"transformer": _agreed("transformer", recipe.transformer, config, folder)}
    if config.ldm is not None and "text_length" not in recipe.model_fields_set:
        taken["text_length"] = config.ldm.text_length
    if _is_pipeline(pipeline := folder.parent):
        taken["vq"] = recipe.vq or str(pipeline / VQ)
        path = recipe.tokenizer.path or str(pipeline / TOKENIZER)
        taken["tokenizer"] = {**recipe.tokenizer.to_mapping(), "path": path}
    return taken


def start_uses(recipe: StartedRecipe) -> dict[str, str]:
    """`start_from` and the folder that it means, for `run_training`; nothing without `start_from`."""
    return {} if recipe.start_from is None else {"start_from": str(start_folder(recipe))}


def _is_pipeline(folder: Path) -> bool:
    return has_model_json(folder / INDEX_NAME)


def _agreed(section: str, given: Config | None, found: Config, folder: Path) -> dict[str, Any]:
    """The folder's configuration, if the fields that the recipe gives agree with it."""
    mapping = found.to_mapping()
    if given is not None:
        theirs, ours = flatten(mapping), flatten(given.model_dump(mode="json", exclude_unset=True))
        problems = tuple(
            f"{section}.{name}={value!r}, but '{folder}' has {theirs.get(name)!r}"
            for name, value in ours.items()
            if name not in _FREE and theirs.get(name) != value
        )
        if problems:
            remedy = f"leave {section} out, or correct it"
            raise RecipeError("the recipe contradicts start_from", "; ".join(problems), remedy, problems=problems)
    return mapping


def _agreed_tokenizer(recipe: TrainClipRecipe, folder: Path, text: CLIPTextConfig) -> Path:
    """The folder of the tokenizer of the text tower: `folder`, or `tokenizer.path` where it has none."""
    given = recipe.tokenizer.path
    chosen = None if given is None else Tokenizer.load(given)
    try:
        own_folder = tokenizer_folder(folder)
        own = Tokenizer.load(own_folder)
    except InputNotFoundError as error:
        if given is None or chosen is None:
            raise InputNotFoundError(
                error.what, error.cause, "name the tokenizer's folder in tokenizer.path"
            ) from error
        # Old files of transformers say 2 and mean the largest id.
        end = chosen.vocab_size - 1 if text.eos_token_id == 2 else text.eos_token_id
        if chosen.end_id == end and chosen.vocab_size <= text.vocab_size:
            return Path(given)
        cause = f"its texts end with token {chosen.end_id}, those of the text tower with {end}"
        raise RecipeError(f"tokenizer.path: '{given}' does not fit '{folder}'", cause) from error
    if chosen is None or chosen.fingerprint == own.fingerprint:
        return own_folder
    cause = f"the vocabulary of '{folder}' is another one, with which its text tower was trained"
    raise RecipeError(f"tokenizer.path: '{given}' cannot be used with start_from", cause, "leave tokenizer out")


def _process_defaults(recipe: TrainUnetRecipe, pipeline: Path, warn: Callable[[str], None]) -> dict[str, Any]:
    """The fields of the pipeline's process that the recipe leaves out."""
    found, given = read_settings(pipeline).diffusion, recipe.diffusion.model_fields_set
    for name in sorted(given & found.keys()):
        if (value := getattr(recipe.diffusion, name)) != found[name]:
            warn(f"diffusion.{name}={value!r}, but the scheduler of '{pipeline}' has {found[name]!r}")
    return {name: value for name, value in found.items() if name not in given}


def build_model(model_class: ModelClass[ModuleT], config: Any, recipe: StartedRecipe) -> ModuleT:
    """The model that a recipe trains: with fresh weights or those of `start_from`, frozen as the recipe says.

    Args:
        model_class: called with `config`.
        recipe: as `resolve_start` returns it.

    Raises:
        CheckpointError: the tensors of `start_from` do not fit; the first are named.
        RecipeError: a pattern of `freeze` matches nothing.
    """
    if recipe.start_from is None:
        return model_class(config)
    module = load_model(model_class, start_folder(recipe), parse=lambda _: config)
    freeze(module, recipe.freeze)
    return module


def freeze(module: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze the parameters whose names match, as in a shell: `*` stands for any text, dots included.

    Args:
        module: its parameters no longer require gradients where they are frozen.
        patterns: apply in order; one that begins with `!` thaws what it matches.

    Raises:
        RecipeError: a pattern matches nothing, or nothing is left to train, or nothing is frozen.
    """
    parameters = dict(module.named_parameters())
    frozen: set[str] = set()
    unmatched = []
    for pattern in patterns:
        matched = {name for name in parameters if fnmatch.fnmatchcase(name, pattern.removeprefix("!"))}
        frozen = frozen - matched if pattern.startswith("!") else frozen | matched
        if not matched:
            unmatched.append(pattern)
    if unmatched:
        there = dict.fromkeys(n if "." not in n else n.partition(".")[0] + ".*" for n in parameters)
        raise RecipeError(
            f"freeze: no parameter matches {', '.join(map(repr, unmatched))}", f"there are {', '.join(there)}"
        )
    if patterns and not frozen:
        cause = "each matches only what a later pattern with '!' excepts, or begins with '!' itself"
        raise RecipeError("freeze leaves nothing frozen", cause, "begin with '*' to freeze all but what '!' excepts")
    if len(frozen) == len(parameters):
        raise RecipeError("freeze leaves nothing to train", f"all {len(parameters)} parameters match")
    for name in frozen:
        parameters[name].requires_grad_(False)


def frozen_names(module: nn.Module) -> frozenset[str]:
    """Names of the parameters that `freeze` has frozen."""
    return frozenset(name for name, parameter in module.named_parameters() if not parameter.requires_grad)
