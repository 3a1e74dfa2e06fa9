"""The text encoders of a denoiser's recipe: one CLIP, a pair of them, or a pair and T5."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn

from ldm_cli.core.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from ldm_cli.core.models.sd3_transformer_2d_config import SD3Transformer2DConfig
from ldm_cli.core.models.t5_encoder import T5EncoderModel
from ldm_cli.core.precision import DTYPES
from ldm_cli.data.tokenizer import Tokenizer
from ldm_cli.families.clip_pair_encoder import CLIPPairEncoder, pair_key
from ldm_cli.families.clip_t5_encoder import T5_LENGTH, CLIPT5Encoder, clip_t5_key
from ldm_cli.families.clip_text_encoder import (
    CLIPTextEncoder,
    clip_skip_of,
    encoder_key,
    outline_tower,
    tokenizer_folder,
)
from ldm_cli.families.latent_diffusion import TextEncoder
from ldm_cli.families.t5_encoder import T5Encoder, is_t5, t5_key, t5_length_of
from ldm_cli.formats.model_folder import outline_model
from ldm_cli.formats.pipeline_folder import TEXT_ENCODER, TEXT_ENCODER_2, TEXT_ENCODER_3
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
    folders = [Path(folder) for folder in text_folders(recipe).values()]
    skip, chunks = recipe.clip_skip, recipe.caption_chunks
    if isinstance(recipe.model, SD3Transformer2DConfig):
        return CLIPT5Encoder.load(
            folders,
            recipe.model.joint_attention_dim,
            warn,
            t5_length=_t5_length(recipe),
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
    folders = [Path(folder) for folder in text_folders(recipe).values()]
    if isinstance(recipe.model, SD3Transformer2DConfig):
        key = clip_t5_key(folders, recipe.model.joint_attention_dim, _t5_length(recipe))
    elif len(folders) > 1:
        key = pair_key(folders[0], folders[1])
    elif is_t5(folders[0]):
        return t5_key(folders[0], recipe.max_sequence_length or t5_length_of(folders[0]))
    else:
        key = encoder_key(folders[0], Tokenizer.load(tokenizer_folder(folders[0])))
    skip = recipe.clip_skip or clip_skip_of(folders[0])
    return key | {"clip_skip": str(skip), "caption_chunks": str(recipe.caption_chunks)}


def outline_text_encoders(recipe: TrainUnetRecipe, notes: list[str]) -> dict[str, nn.Module | None]:
    """The text encoders on the meta device, by recipe field; a missing one is None, and noted."""
    projecting = partial(outline_tower, model_class=CLIPTextModelWithProjection)
    is_first_projecting = isinstance(recipe.model, SD3Transformer2DConfig)
    outlines: dict[str, Callable[[Path], nn.Module]] = {
        TEXT_ENCODER: projecting if is_first_projecting else _outline_alone,
        TEXT_ENCODER_2: projecting,
        TEXT_ENCODER_3: partial(outline_model, T5EncoderModel),
    }
    return {field: model_at(field, folder, outlines[field], notes) for field, folder in text_folders(recipe).items()}


def _outline_alone(folder: Path) -> nn.Module:
    return outline_model(T5EncoderModel, folder) if is_t5(folder) else outline_tower(folder, CLIPTextModel)


def _t5_length(recipe: TrainUnetRecipe) -> int:
    if recipe.max_sequence_length is not None:
        return recipe.max_sequence_length
    return T5_LENGTH if recipe.text_encoder_3 else 0
