"""Tiny random models, drawn scenes and a recipe for `ldm eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.autoencoder_kl_config import AutoencoderKLConfig
from ldm_cli.core.models.clip import CLIPTextModel
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig
from ldm_cli.data import scene_vocabulary as words
from ldm_cli.data.scenes import scene, write_scenes
from ldm_cli.data.tokenizer import Tokenizer
from ldm_cli.data.tokenizer_config import TokenizerConfig
from ldm_cli.families.clip_text_encoder import CLIPTextEncoder
from ldm_cli.families.stable_diffusion import StableDiffusion
from ldm_cli.formats.save_model import save_model
from ldm_cli.formats.scheduler_file import our_settings
from ldm_cli.recipe.schema import EvalRecipe
from ldm_cli.reporting import SilentReporter

from .tiny import save_random_clip


def write_home(home: Path, num_scenes: int = 24) -> Path:
    """Make `scenes`, `clip`, `vae` and `pipeline` in a folder."""
    write_scenes(home / "scenes", 1, 32, 0, SilentReporter(), val_samples=num_scenes, shard_samples=10)
    tokenizer = Tokenizer.train([scene(0, i, "val", 32).caption for i in range(24)], TokenizerConfig())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = save_random_clip(home / "clip", tokenizer)
        vae = AutoencoderKL(
            AutoencoderKLConfig(
                block_out_channels=(8, 8),
                norm_num_groups=4,
                latent_channels=3,
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
            )
        )
        unet = UNet2DConditionModel(
            UNet2DConditionConfig(
                sample_size=16,
                in_channels=3,
                out_channels=3,
                block_out_channels=(8,),
                layers_per_block=1,
                down_block_types=("CrossAttnDownBlock2D",),
                up_block_types=("CrossAttnUpBlock2D",),
                cross_attention_dim=16,
                attention_head_dim=2,
                norm_num_groups=4,
            )
        )
        text_encoder = CLIPTextModel(clip.config.text_config)
    save_model(home / "vae", vae.state_dict(), vae.config.to_hugging_face())
    StableDiffusion(unet, vae, CLIPTextEncoder(text_encoder, tokenizer), our_settings({})).save(home / "pipeline")
    return home


def recipe(home: Path, metrics: list[str], data: dict[str, Any] | None = None, **changes: Any) -> EvalRecipe:
    """The recipe of some metrics, on the first 20 scenes and 6 pictures unless `changes` say otherwise."""
    values = {
        "clip": str(home / "clip"),
        "vae": str(home / "vae"),
        "pipeline": str(home / "pipeline"),
        "metrics": metrics,
        "num_samples": 20,
        "num_generated": 6,
        "batch_size": 7,
        "sampling": {"steps": 2, "guidance": 1.0},
        "zero_shot": [
            {"name": "color", "label": "json:color", "classes": words.COLOR_NAMES, "templates": ["a {} circle", "{}"]},
            {"name": "held out", "label": "json:num_objects", "classes": ["none", "one", "two"]},
        ],
    }
    return EvalRecipe.from_mapping(
        {
            "command": "eval",
            "data": {"shards": str(home / "scenes" / "val-*.tar"), "image_size": 32} | (data or {}),
            "eval": values | changes,
        }
    )
