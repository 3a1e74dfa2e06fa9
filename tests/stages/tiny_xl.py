"""Stable Diffusion XL with a few thousand parameters, and recipes that train its denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm_cli.core.diffusion.config import DiffusionConfig
from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.autoencoder_kl_config import AutoencoderKLConfig
from ldm_cli.core.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from ldm_cli.core.models.clip_config import CLIPTextConfig
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig
from ldm_cli.data.tokenizer import Tokenizer
from ldm_cli.data.tokenizer_config import TokenizerConfig
from ldm_cli.families.clip_pair_encoder import CLIPPairEncoder
from ldm_cli.families.clip_text_encoder import CLIPTextEncoder
from ldm_cli.families.stable_diffusion_xl import StableDiffusionXL
from ldm_cli.formats.scheduler_file import our_settings

from ..sampling.tiny import randomize
from .tiny import unet_recipe, vae_recipe

SIZES = {
    "cross_attention_dim": 24,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 12 + 6 * 8,
}


def encoder(pad: str, second: bool, kind: Any = None, projection_dim: int = 12) -> CLIPTextEncoder:
    """A text tower; `kind` is that of Stable Diffusion XL unless it is given."""
    learnt = Tokenizer.train(["a red circle", "a blue square"], TokenizerConfig(vocab_size=540))
    tokenizer = Tokenizer(learnt._vocab, learnt._merges, pad)
    config = CLIPTextConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16 if second else 8,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=projection_dim,
        bos_token_id=tokenizer.start_id,
        eos_token_id=tokenizer.end_id,
    )
    kind = kind or (CLIPTextModelWithProjection if second else CLIPTextModel)
    return CLIPTextEncoder(randomize(kind(config), 7 + second), tokenizer, is_penultimate=True)


def save_tiny_xl(folder: Path) -> dict[str, str]:
    """Write a pipeline with random weights; returns the folders of the models that a training recipe names."""
    unet = unet_recipe(Path(), Path(), Path())["unet"] | SIZES | {"sample_size": 12}
    StableDiffusionXL(
        denoiser=randomize(UNet2DConditionModel(UNet2DConditionConfig.from_mapping(unet)), 4),
        codec=randomize(AutoencoderKL(AutoencoderKLConfig.from_mapping(vae_recipe(Path())["vae"])), 5),
        encoder=CLIPPairEncoder(encoder("<|endoftext|>", False), encoder("!", True)),
        settings=our_settings(DiffusionConfig().to_mapping()),
    ).save(folder)
    return {name: str(folder / name) for name in ("vae", "text_encoder", "text_encoder_2")}


def xl_recipe(
    scenes: Path, models: Mapping[str, str], diffusion: Mapping[str, Any] | None = None, **train: Any
) -> dict[str, Any]:
    recipe = unet_recipe(scenes, Path(), Path(), diffusion, **train) | models
    recipe["unet"] |= SIZES
    recipe["data"] |= {"flip_probability": 0.5, "image_size": 24}
    return recipe
