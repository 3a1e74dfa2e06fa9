"""Random pictures, captions and models, for recipes whose own are not there."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image

from ldm_cli.core.condition import NUM_SIZES
from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.autoencoder_kl_config import AutoencoderKLConfig
from ldm_cli.core.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from ldm_cli.core.models.clip_config import CLIPTextConfig
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig
from ldm_cli.data.shard_writer import write_shard
from ldm_cli.data.tokenizer import Tokenizer
from ldm_cli.data.tokenizer_config import TokenizerConfig
from ldm_cli.errors import InputNotFoundError, UsageError
from ldm_cli.families.clip_pair_encoder import CLIPPairEncoder
from ldm_cli.families.clip_text_encoder import CLIPTextEncoder
from ldm_cli.families.stable_diffusion import StableDiffusion
from ldm_cli.families.stable_diffusion_xl import StableDiffusionXL
from ldm_cli.formats.model_folder import without_weights
from ldm_cli.formats.model_source import split_at_file
from ldm_cli.formats.pipeline_folder import TEXT_ENCODER, TEXT_ENCODER_2, VAE
from ldm_cli.formats.scheduler_file import our_settings
from ldm_cli.recipe.schema import TrainClipRecipe, TrainUnetRecipe
from ldm_cli.recipe.train_recipe import TrainRecipe
from ldm_cli.reporting import SilentReporter
from ldm_cli.stages import precompute
from ldm_cli.stages.support.options import RunOptions
from ldm_cli.stages.support.training_run import open_data

CONTEXT_LENGTH = 77
"""Text tokens of every CLIP that diffusion models use."""
_NUM_SHARDS = 4


def is_complete(recipe: TrainRecipe) -> bool:
    """Whether the shards, models and cache that a recipe names exist; `start_from` must in any case."""
    named: list[str | None] = []
    if isinstance(recipe, TrainUnetRecipe):
        named = [recipe.vae, recipe.text_encoder, recipe.text_encoder_2, recipe.text_encoder_3, recipe.cache]
    elif isinstance(recipe, TrainClipRecipe):
        named = [recipe.tokenizer.path]
    try:
        open_data(recipe.data, SilentReporter())
    except InputNotFoundError:
        return False
    return all(Path(name).exists() or split_at_file(Path(name)) is not None for name in named if name)


def with_stand_ins(
    recipe: TrainRecipe, folder: Path, device: str, num_images: int = 256, context_length: int = CONTEXT_LENGTH
) -> TrainRecipe:
    """The recipe with random data in place of its own, and random models where it uses any.

    Args:
        recipe: of a trainer, `start_from` resolved.
        folder: where they are written: JPEGs of `data.image_size` pixels with captions; for a U-Net an autoencoder and
            a text encoder of Stable Diffusion's proportions, and the cache of both if the recipe has one.
        device: computes the cache.
        context_length: text tokens per picture, of a U-Net.
    """
    write_pictures(folder / "shards", num_images, recipe.data.image_size)
    data = recipe.data.model_copy(update={"shards": str(folder / "shards"), "val_shards": None, "stream": False})
    recipe = recipe.model_copy(update={"data": data})
    if isinstance(recipe, TrainClipRecipe):
        return recipe.model_copy(update={"tokenizer": recipe.tokenizer.model_copy(update={"path": None})})
    if not isinstance(recipe, TrainUnetRecipe):
        return recipe
    random_family(recipe, context_length, has_denoiser=False).save_companions(folder)
    named = {"vae": str(folder / VAE), "text_encoder": str(folder / TEXT_ENCODER)}
    if recipe.text_encoder_2:
        named["text_encoder_2"] = str(folder / TEXT_ENCODER_2)
    if recipe.cache is None:
        return recipe.model_copy(update=named)
    recipe = recipe.model_copy(update=named | {"cache": str(folder / "cache")})
    precompute.run(recipe, RunOptions(device=device), SilentReporter())
    if device == "cuda":
        torch.cuda.empty_cache()  # the contenders' processes need the memory
    return recipe


def random_family(
    recipe: TrainUnetRecipe, context_length: int = CONTEXT_LENGTH, *, has_denoiser: bool = True
) -> StableDiffusion | StableDiffusionXL:
    """The U-Net of a recipe with companions that fit it, all of random weights that depend on the recipe alone.

    The autoencoder has 0.4 times the U-Net's width, and the text encoder twelve layers, as in Stable Diffusion.

    Args:
        has_denoiser: False leaves the U-Net without weights.
    """
    torch.manual_seed(recipe.seed)
    unet = unet_of(recipe)
    side = unet.sample_size[0] if isinstance(unet.sample_size, tuple) else (unet.sample_size or 64)
    levels = max(1, (recipe.data.image_size // side).bit_length())
    narrow = max(32, unet.block_out_channels[0] * 2 // 5 // 32 * 32)
    down, up = AutoencoderKLConfig().down_block_types, AutoencoderKLConfig().up_block_types
    vae = AutoencoderKLConfig(
        block_out_channels=tuple(narrow * min(4, 2**level) for level in range(levels)),
        down_block_types=down * levels,
        up_block_types=up * levels,
        layers_per_block=2,
        latent_channels=unet.out_channels,
        sample_size=recipe.data.image_size,
    )
    with nullcontext() if has_denoiser else without_weights():
        denoiser = UNet2DConditionModel(unet)
    width, settings = max(unet.per_level(unet.cross_attention_dim)), our_settings(recipe.diffusion.to_mapping())
    if not recipe.text_encoder_2:
        text = _tower(CLIPTextModel, width, context_length)
        return StableDiffusion(denoiser, AutoencoderKL(vae), text, settings)
    second = pooled_width(unet)
    pair = CLIPPairEncoder(
        _tower(CLIPTextModel, width - second, context_length),
        _tower(CLIPTextModelWithProjection, second, context_length),
    )
    return StableDiffusionXL(denoiser, AutoencoderKL(vae), pair, settings)


def _tower(model_class: Callable[[CLIPTextConfig], CLIPTextModel], width: int, context_length: int) -> CLIPTextEncoder:
    """A text encoder of this width; with a projection to as many numbers."""
    dice = random.Random(0)
    tokenizer = Tokenizer.train([_caption(dice) for _ in range(256)], TokenizerConfig())
    config = CLIPTextConfig(
        vocab_size=tokenizer.vocab_size,
        bos_token_id=tokenizer.start_id,
        eos_token_id=tokenizer.end_id,
        pad_token_id=tokenizer.pad_id,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=12,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=context_length,
        projection_dim=width,
    )
    return CLIPTextEncoder(model_class(config), tokenizer)


def unet_of(recipe: TrainUnetRecipe) -> UNet2DConditionConfig:
    """The U-Net of a recipe.

    Raises:
        UsageError: it trains a transformer.
    """
    if not isinstance(recipe.model, UNet2DConditionConfig):
        raise UsageError("nothing to measure with", "ldm bench knows U-Nets, and the recipe trains a transformer")
    return recipe.model


def pooled_width(unet: UNet2DConditionConfig) -> int:
    """P, the numbers of pooled text that a U-Net with `text_time` takes."""
    width, dim = unet.projection_class_embeddings_input_dim, unet.addition_time_embed_dim
    assert width is not None  # the Config's own check
    assert dim is not None  # the same
    return width - NUM_SIZES * dim


def write_pictures(folder: Path, num_images: int, side: int) -> list[str]:
    """Write shards of square JPEGs with captions; the files. A picture of 256 pixels has about 27 KB."""
    folder.mkdir(parents=True)
    dice, each = random.Random(0), -(-num_images // _NUM_SHARDS)
    for first in range(0, num_images, each):
        samples = (
            {"__key__": f"{number:06}", "jpg": _picture(dice, side), "txt": _caption(dice).encode()}
            for number in range(first, min(first + each, num_images))
        )
        write_shard(folder / f"random-{first // each:06}.tar", samples)
    return sorted(map(str, folder.glob("*.tar")))


def _picture(dice: random.Random, side: int) -> bytes:
    coarse = Image.frombytes("RGB", (24, 24), dice.randbytes(24 * 24 * 3))
    coarse = coarse.resize((side, side), Image.Resampling.BICUBIC)
    grain = Image.frombytes("RGB", (side, side), dice.randbytes(side * side * 3))
    buffer = BytesIO()
    Image.blend(coarse, grain, 0.08).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _caption(dice: random.Random) -> str:
    return " ".join("".join(dice.choices("abcdefghijklmnopqrstuvwxyz", k=4)) for _ in range(8))
