"""A Stable Diffusion 3 folder that diffusers wrote, small enough for tests, with shapes drawn by a seed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.xl_pipeline import change, tower
from tests.sampling.tiny import VAE, randomize, tiny_tokenizer
from tests.stages.tiny_sd3 import tiny_t5_tokenizer

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")


def their_sd3_folder(
    folder: Path,
    seed: int = 0,
    *,
    has_t5: bool = True,
    scheduler: Any = None,
    channels: int = 4,
    is_like_published: bool = False,
) -> Path:
    """Write a pipeline into a subfolder; returns that.

    One like those published has their heads, groups, activations and shift, and a first tower that does not project.
    """
    choose, tokenizer, t5_tokenizer = random.Random(seed), tiny_tokenizer(), tiny_t5_tokenizer()
    tokenizer.save(folder / "tokenizer")
    tokenizer.save(folder / "tokenizer_2")
    change(folder / "tokenizer_2/tokenizer_config.json", pad_token="!")
    change(folder / "tokenizer_2/special_tokens_map.json", pad_token="!")
    t5_tokenizer.save(folder / "tokenizer_3", 256)
    first, second = tower(choose, tokenizer), tower(choose, tokenizer)
    if is_like_published:
        first.update(first.to_dict() | {"hidden_size": 64, "num_attention_heads": 1, "hidden_act": "quick_gelu"})
        first.projection_dim = first.hidden_size
        second.update(second.to_dict() | {"hidden_size": 128, "num_attention_heads": 2, "hidden_act": "gelu"})
    width = first.hidden_size + second.hidden_size + choose.choice([0, 4])
    heads, head_dim, layers = choose.choice([1, 2]), choose.choice([8, 12]), choose.choice([2, 3])
    head_dim = 64 if is_like_published else head_dim
    t5 = transformers.T5Config(
        vocab_size=t5_tokenizer.vocab_size,
        d_model=width,
        d_kv=4,
        d_ff=20,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        num_layers=layers,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        caption_projection_dim=heads * head_dim,
        joint_attention_dim=width,
        pooled_projection_dim=first.projection_dim + second.projection_dim,
        pos_embed_max_size=12,
        qk_norm=choose.choice([None, "rms_norm"]),
        dual_attention_layers=choose.choice([(), (0,)]),
    )
    vae = {**VAE, "latent_channels": channels, "scaling_factor": 1.5305, "shift_factor": 0.0609}
    if is_like_published:
        vae |= {"block_out_channels": (32, 64), "norm_num_groups": 32}
        vae |= {"use_quant_conv": False, "use_post_quant_conv": False}
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    towers = [transformers.CLIPTextModelWithProjection(config) for config in (first, second)]
    for seed_of_tower, model in enumerate(towers, 3):
        randomize(model, seed_of_tower)
    if is_like_published:
        torch.nn.init.eye_(towers[0].text_projection.weight)
    t5_model = randomize(transformers.T5EncoderModel(t5), 5) if has_t5 else None
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=randomize(transformer, 1),
        scheduler=scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=choose.choice([1.0, 3.0])),
        vae=randomize(diffusers.AutoencoderKL(**vae), 2),
        text_encoder=towers[0],
        text_encoder_2=towers[1],
        text_encoder_3=t5_model,
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        tokenizer_3=transformers.T5TokenizerFast.from_pretrained(folder / "tokenizer_3") if has_t5 else None,
    )
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"
