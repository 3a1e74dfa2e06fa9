"""Stable Diffusion 3 with a few thousand parameters, and recipes that train its denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from ldm_cli.core.diffusion.config import DiffusionConfig
from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.autoencoder_kl_config import AutoencoderKLConfig
from ldm_cli.core.models.clip import CLIPTextModelWithProjection
from ldm_cli.core.models.sd3_transformer_2d import SD3Transformer2DModel
from ldm_cli.core.models.sd3_transformer_2d_config import SD3Transformer2DConfig
from ldm_cli.core.models.t5_encoder import T5EncoderModel
from ldm_cli.core.models.t5_encoder_config import T5EncoderConfig
from ldm_cli.data.unigram_tokenizer import UnigramTokenizer
from ldm_cli.families.clip_t5_encoder import CLIPT5Encoder
from ldm_cli.families.clip_text_encoder import CLIPTextEncoder
from ldm_cli.families.stable_diffusion_3 import StableDiffusion3
from ldm_cli.families.t5_encoder import T5TextEncoder
from ldm_cli.formats.scheduler_file import our_settings

from ..sampling.tiny import randomize
from .tiny import unet_recipe, vae_recipe
from .tiny_xl import encoder

WIDTH = 28
"""Of T5; the towers have 8 and 16."""
TRANSFORMER = {
    "sample_size": 12,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "caption_projection_dim": 16,
    "joint_attention_dim": WIDTH,
    "pooled_projection_dim": 10 + 12,
    "pos_embed_max_size": 16,
    "qk_norm": "rms_norm",
    "dual_attention_layers": [0],
}


def tower(pad: str, second: bool) -> CLIPTextEncoder:
    return encoder(pad, second, CLIPTextModelWithProjection, 12 if second else 10)


def tiny_t5_tokenizer() -> UnigramTokenizer:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False)
    captions = ["a small red circle at the top left", "a blue square", "a green triangle left of a red circle"]
    tokenizer.train_from_iterator(captions * 5, trainer)
    return UnigramTokenizer(tokenizer)


def tiny_t5(width: int = WIDTH) -> T5TextEncoder:
    tokenizer = tiny_t5_tokenizer()
    config = T5EncoderConfig(vocab_size=tokenizer.vocab_size, d_model=width, d_kv=4, d_ff=20, num_layers=2, num_heads=2)
    return T5TextEncoder(randomize(T5EncoderModel(config), 6), tokenizer)


def tiny_sd3(*, has_t5: bool = True, t5_length: int = 9) -> StableDiffusion3:
    """A family of random weights."""
    vae = vae_recipe(Path())["vae"] | {"latent_channels": 4}
    diffusion = DiffusionConfig(prediction_type="flow_prediction", flow_shift=3.0)
    return StableDiffusion3(
        randomize(SD3Transformer2DModel(SD3Transformer2DConfig.from_mapping(TRANSFORMER)), 4),
        randomize(AutoencoderKL(AutoencoderKLConfig.from_mapping(vae)), 5),
        CLIPT5Encoder(
            [tower("<|endoftext|>", False), tower("!", True)], tiny_t5() if has_t5 else None, WIDTH, t5_length
        ),
        our_settings(diffusion.to_mapping()),
    )


def save_tiny_sd3(folder: Path, **options: Any) -> dict[str, str]:
    """Write a pipeline; returns the folders of the models that a training recipe names."""
    tiny_sd3(**options).save(folder)
    names = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    return {name: str(folder / name) for name in names if (folder / name).is_dir()}


def sd3_recipe(
    scenes: Path, models: Mapping[str, str], diffusion: Mapping[str, Any] | None = None, **train: Any
) -> dict[str, Any]:
    process = {"prediction_type": "flow_prediction", "timestep_sampling": "logit_normal", **(diffusion or {})}
    recipe = unet_recipe(scenes, Path(), Path(), process, {"image_size": 24}, **train) | models
    del recipe["unet"]
    length = {"max_sequence_length": 9} if "text_encoder_3" in models else {}
    return recipe | length | {"transformer": TRANSFORMER}
