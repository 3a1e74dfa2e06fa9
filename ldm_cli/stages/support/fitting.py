"""Whether the parts of a denoiser's recipe fit together, and the denoiser's configuration for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from ldm_cli.core.codec import Codec, PixelCodec
from ldm_cli.core.models.clip_config import CLIPTextConfig
from ldm_cli.core.models.sd3_transformer_2d_config import SD3Transformer2DConfig
from ldm_cli.core.models.t5_encoder_config import T5EncoderConfig
from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig
from ldm_cli.errors import RecipeError
from ldm_cli.families import stable_diffusion_3, stable_diffusion_xl
from ldm_cli.formats.pipeline_folder import TRANSFORMER
from ldm_cli.recipe.schema import TrainUnetRecipe
from ldm_cli.stages.support.low_resolution import upscaler_problems
from ldm_cli.stages.support.pixel_training import pixel_problems
from ldm_cli.stages.support.text_encoders import text_folders

DenoiserConfig = UNet2DConditionConfig | SD3Transformer2DConfig


def expect_known_conditions(recipe: TrainUnetRecipe) -> None:
    """Make sure that training has every condition that the denoiser needs.

    Raises:
        RecipeError: naming the fields that ask for others.
    """
    _expect_fitting_patches(recipe)
    config, known = recipe.model, "addition_embed_type=text_time" if recipe.text_encoder_2 else ""
    if recipe.image_embedding is not None:
        known = "class_embed_type=projection"
    if recipe.classes is not None:
        known = f"num_class_embeds={len(recipe.classes) + 1}"
    if isinstance(config, SD3Transformer2DConfig):
        return
    # The level of a small picture's noise has a field of its own in latents and in pixels: `upscaler_problems`.
    fields = [field for field in config.pooled_fields if field != known and recipe.low_resolution is None]
    if config.time_cond_proj_dim is not None:
        fields = [*fields, f"time_cond_proj_dim={config.time_cond_proj_dim}"]
    if fields:
        problems = tuple(f"unet.{field} asks for a condition that train-unet does not have" for field in fields)
        remedy = "set it to null" + ("" if known or config.addition_embed_type is None else ", or give text_encoder_2")
        raise RecipeError("this U-Net cannot be trained", "; ".join(problems), remedy, problems=problems)


def _expect_fitting_patches(recipe: TrainUnetRecipe) -> None:
    """Raise RecipeError if `patches` asks for something that this recipe does not have."""
    patches, config, problems = recipe.patches, recipe.model, []
    if patches.left_out or patches.clip:
        if not isinstance(config, SD3Transformer2DConfig):
            problems.append("patches needs a transformer")
        else:
            used = {"aligned_block": patches.aligned_block} if patches.clip else {"mixer_blocks": patches.mixer_blocks}
            problems += [
                f"patches.{name}={number}, but transformer.num_layers={config.num_layers}"
                for name, number in used.items()
                if number > config.num_layers
            ]
    if patches.clip and recipe.cache is not None:
        problems.append("patches.clip looks at the images: leave cache out")
    if problems:
        raise RecipeError("this recipe's patches cannot be trained so", "; ".join(problems), problems=tuple(problems))


def fitted_config(recipe: TrainUnetRecipe, codec: Codec, texts: Sequence[nn.Module]) -> DenoiserConfig:
    """The denoiser's configuration for latents of this size, if it fits codec and text encoders.

    Args:
        texts: the text encoders, on any device.

    Raises:
        RecipeError: channels, widths or sizes do not fit together.
    """
    config, name, channels = recipe.model, recipe.component, codec.channels
    text_configs: list[Any] = [text.config for text in texts]
    if isinstance(config, SD3Transformer2DConfig):
        step = codec.factor * config.patch_size
        problems = _transformer_problems(recipe, config, step) + stable_diffusion_3.size_problems(config, texts)
    elif isinstance(codec, PixelCodec):
        step = codec.factor
        problems = pixel_problems(config, texts, enlarges=recipe.low_resolution is not None)
    else:
        step = codec.factor
        problems = _unet_problems(recipe, config, text_configs)
    problems += upscaler_problems(recipe, codec, texts)
    if recipe.diffusion.encoder_dropout and name != TRANSFORMER and not recipe.text_encoder_3:
        problems.append(
            "diffusion.encoder_dropout is for a transformer, or T5 beside a CLIP: use diffusion.caption_dropout"
        )
    towers = [config for config in text_configs if not isinstance(config, T5EncoderConfig)]
    layers = min([config.num_hidden_layers for config in towers], default=1)
    if (recipe.clip_skip or 1) > layers:
        problems.append(f"clip_skip={recipe.clip_skip}, but a text encoder has {layers} layers")
    has_further_channels = recipe.is_of_pixels or recipe.low_resolution is not None
    if not has_further_channels and (config.in_channels != channels or config.out_channels != channels):
        problems.append(
            f"{name}.in_channels={config.in_channels} and {name}.out_channels={config.out_channels}, "
            f"but the latents of '{recipe.vae}' have {channels} channels"
        )
    if recipe.data.image_size % step:
        problems.append(f"data.image_size={recipe.data.image_size} is no multiple of {step}")
    buckets = recipe.data.aspect_buckets
    if buckets is not None and buckets.step % step:
        problems.append(f"data.aspect_buckets.step={buckets.step} is no multiple of {step}")
    if problems:
        raise RecipeError(
            "the parts do not fit together", "; ".join(problems), "change the recipe", problems=tuple(problems)
        )
    if name == TRANSFORMER and recipe.start_from is not None:
        return config  # the positions of its patches are in the weights, and follow from its own sample_size
    return config.model_copy(update={"sample_size": recipe.data.image_size // codec.factor})


def _transformer_problems(recipe: TrainUnetRecipe, config: SD3Transformer2DConfig, step: int) -> list[str]:
    """What the transformer cannot take; a patch has a side of `step` pixels."""
    problems = []
    if recipe.diffusion.prediction_type != "flow_prediction":
        problems.append(
            f"diffusion.prediction_type={recipe.diffusion.prediction_type}, expected flow_prediction: the pipelines of "
            "a transformer know no other"
        )
    buckets = recipe.data.aspect_buckets
    longest = recipe.data.image_size * math.sqrt(1.0 if buckets is None else buckets.max_aspect)
    if longest > config.pos_embed_max_size * step:
        problems.append(
            f"transformer.pos_embed_max_size={config.pos_embed_max_size} patches of {step} pixels, but images have "
            f"sides of {longest:.0f} pixels"
        )
    return problems


def _unet_problems(
    recipe: TrainUnetRecipe, config: UNet2DConditionConfig, texts: Sequence[CLIPTextConfig | T5EncoderConfig]
) -> list[str]:
    """What does not fit the text encoders."""
    pooled = getattr(texts[-1], "projection_dim", 0)
    problems = stable_diffusion_xl.size_problems(config, pooled) if recipe.text_encoder_2 else []
    is_t5 = isinstance(texts[0], T5EncoderConfig)
    if is_t5 and (recipe.clip_skip or recipe.caption_chunks > 1):
        problems.append("clip_skip and caption_chunks are for CLIP, and text_encoder is T5")
    if not is_t5 and not recipe.text_encoder_3 and recipe.max_sequence_length is not None:
        problems.append("max_sequence_length is for T5, and text_encoder is a CLIP")
    sizes, widths = [text.hidden_size for text in texts], config.cross_attention_dim
    text_width = max(sizes) if recipe.text_encoder_3 else sum(sizes)
    if any(width != text_width for width in ((widths,) if isinstance(widths, int) else widths)):
        given = " and ".join(f"'{folder}'" for folder in text_folders(recipe).values())
        verb = "give" if len(texts) > 1 else "gives"
        problems.append(f"unet.cross_attention_dim={widths}, but {given} {verb} {text_width}")
    return problems
