"""The text encoders of a denoiser's recipe: one CLIP, a pair of them, T5, or CLIP and T5."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

from torch import nn

from ldm_cli.core.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from ldm_cli.core.models.sd3_transformer_2d_config import SD3Transformer2DConfig
from ldm_cli.core.models.t5_encoder import T5EncoderModel
from ldm_cli.core.precision import DTYPES
from ldm_cli.data.tokenizer import Tokenizer
from ldm_cli.errors import InputNotFoundError, RecipeError
from ldm_cli.families.clip_pair_encoder import CLIPPairEncoder, pair_key
from ldm_cli.families.clip_t5_encoder import CLIPT5Encoder, clip_t5_key
from ldm_cli.families.clip_text_encoder import (
    CLIPTextEncoder,
    clip_skip_of,
    encoder_key,
    outline_tower,
    tokenizer_folder,
)
from ldm_cli.families.latent_diffusion import TextEncoder
from ldm_cli.families.t5_encoder import T5_LENGTH, T5Encoder, is_t5, t5_key, t5_length_of
from ldm_cli.formats.model_folder import outline_model
from ldm_cli.formats.pipeline_folder import MAX_SEQUENCE_LENGTH, TEXT_ENCODER, TEXT_ENCODER_2, TEXT_ENCODER_3
from ldm_cli.recipe.schema import TrainUnetRecipe
from ldm_cli.stages.support.model_sizes import model_at


def text_folders(recipe: TrainUnetRecipe) -> dict[str, str]:
    """Recipe field → folder, of the text encoders that the recipe names."""
    fields = {
        TEXT_ENCODER: recipe.text_encoder,
        TEXT_ENCODER_2: recipe.text_encoder_2,
        TEXT_ENCODER_3: recipe.text_encoder_3,
    }
    return {field: folder for field, folder in fields.items() if folder}


def open_text_encoder(recipe: TrainUnetRecipe, warn: Callable[[str], None]) -> TextEncoder:
    """Read the text encoders of a recipe; errors as in their `load`.

    Args:
        warn: called once for each CLIP tower if captions are cut.
    """
    paths = {field: Path(folder) for field, folder in text_folders(recipe).items()}
    folders = list(paths.values())
    skip, chunks = recipe.clip_skip, recipe.caption_chunks
    if _joins_t5(recipe):
        return CLIPT5Encoder.load(
            paths,
            _width(recipe),
            warn,
            t5_length=t5_length(recipe),
            t5_dtype=DTYPES[recipe.train.precision or "fp32"],
            clip_skip=skip,
            caption_chunks=chunks,
        )
    if len(folders) > 1:
        return CLIPPairEncoder.load(folders[0], folders[1], warn, clip_skip=skip, caption_chunks=chunks)
    if is_t5(folders[0]):
        dtype, length = DTYPES[recipe.train.precision or "fp32"], recipe.max_sequence_length
        return T5Encoder.load(folders[0], dtype, length, is_for_pixels=recipe.is_of_pixels)
    return CLIPTextEncoder.load(
        folders[0], warn, clip_skip=skip, caption_chunks=chunks, is_for_pixels=recipe.is_of_pixels
    )


def text_key(recipe: TrainUnetRecipe) -> dict[str, str]:
    """What decides the conditions of captions: see `Encoder.key`; the encoders are not read."""
    paths = {field: Path(folder) for field, folder in text_folders(recipe).items()}
    folders = list(paths.values())
    if _joins_t5(recipe):
        key = clip_t5_key(paths, _width(recipe), t5_length(recipe))
    elif len(folders) > 1:
        key = pair_key(folders[0], folders[1])
    elif is_t5(folders[0]):
        length = recipe.max_sequence_length or t5_length_of(folders[0])
        return t5_key(folders[0], TEXT_ENCODER) | {MAX_SEQUENCE_LENGTH: str(length)}
    else:
        key = encoder_key(folders[0], Tokenizer.load(tokenizer_folder(folders[0])))
    skip = recipe.clip_skip or clip_skip_of(folders[0])
    return key | {"clip_skip": str(skip), "caption_chunks": str(recipe.caption_chunks)}


def outline_text_encoders(recipe: TrainUnetRecipe, notes: list[str]) -> dict[str, nn.Module | None]:
    """The text encoders on the meta device, by recipe field; a missing one is None, and noted.

    Raises:
        RecipeError: T5 is named where a CLIP belongs, or the other way round.
    """
    projecting = partial(outline_tower, model_class=CLIPTextModelWithProjection)
    is_first_projecting = isinstance(recipe.model, SD3Transformer2DConfig)
    outlines: dict[str, Callable[[Path], nn.Module]] = {
        TEXT_ENCODER: projecting if is_first_projecting else _outline_alone,
        TEXT_ENCODER_2: projecting,
        TEXT_ENCODER_3: partial(outline_model, T5EncoderModel),
    }
    folders = text_folders(recipe)
    _expect_named_by_kind(folders)
    return {field: model_at(field, folder, outlines[field], notes) for field, folder in folders.items()}


def _expect_named_by_kind(folders: Mapping[str, str]) -> None:
    """Raise RecipeError if T5 and CLIPs beside it are given for one another; a missing folder is no problem here."""
    problems = []
    for field, folder in folders.items() if len(folders) > 1 else ():
        with suppress(InputNotFoundError):
            if is_t5(Path(folder)) and field != TEXT_ENCODER_3:
                problems.append(f"{field} is T5: beside a CLIP name it text_encoder_3, and the CLIP text_encoder")
            elif not is_t5(Path(folder)) and field == TEXT_ENCODER_3:
                problems.append(f"text_encoder_3 must be T5, but '{folder}' is none")
    if problems:
        raise RecipeError("the parts do not fit together", "; ".join(problems), problems=tuple(problems))


def _outline_alone(folder: Path) -> nn.Module:
    return outline_model(T5EncoderModel, folder) if is_t5(folder) else outline_tower(folder, CLIPTextModel)


def _joins_t5(recipe: TrainUnetRecipe) -> bool:
    """Whether T5, or zeros in its place, follow the states of CLIP."""
    return isinstance(recipe.model, SD3Transformer2DConfig) or bool(recipe.text_encoder_3)


def _width(recipe: TrainUnetRecipe) -> int:
    """Of the states that the denoiser attends to."""
    if isinstance(config := recipe.model, SD3Transformer2DConfig):
        return config.joint_attention_dim
    return max(config.per_level(config.cross_attention_dim))


def t5_length(recipe: TrainUnetRecipe) -> int:
    """Tokens of T5, or zeros in its place, that follow those of CLIP."""
    if recipe.max_sequence_length is not None:
        return recipe.max_sequence_length
    return T5_LENGTH if recipe.text_encoder_3 else 0
