"""A Stable Diffusion XL folder that diffusers wrote, small enough for tests, with shapes drawn by a seed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from ldm_cli.data.tokenizer import Tokenizer
from tests.sampling.tiny import UNET, VAE, randomize, tiny_tokenizer

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def tower(choose: random.Random, tokenizer: Tokenizer) -> Any:
    """The configuration of a text encoder with heads, width, layers and projection of its own."""
    heads = choose.choice([1, 2, 3])
    return transformers.CLIPTextConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=heads * choose.choice([4, 8]),
        intermediate_size=choose.choice([16, 28]),
        num_hidden_layers=choose.choice([2, 3]),
        num_attention_heads=heads,
        hidden_act=choose.choice(["quick_gelu", "gelu"]),
        projection_dim=choose.choice([12, 20]),
        bos_token_id=tokenizer.start_id,
        eos_token_id=tokenizer.end_id,
        pad_token_id=tokenizer.pad_id,
    )


def their_xl_folder(folder: Path, seed: int = 0, scheduler: Any = None, index: Any = None, **unet: Any) -> Path:
    """Write a pipeline into a subfolder; returns that. `unet` changes the U-Net's fields, `index` the pipeline's."""
    choose, tokenizer = random.Random(seed), tiny_tokenizer()
    tokenizer.save(folder / "tokenizer")
    tokenizer.save(folder / "tokenizer_2")
    change(folder / "tokenizer_2/tokenizer_config.json", pad_token="!")
    change(folder / "tokenizer_2/special_tokens_map.json", pad_token="!")
    first, second = tower(choose, tokenizer), tower(choose, tokenizer)
    width, levels = choose.choice([8, 16]), 2
    fields = {
        **UNET,
        "cross_attention_dim": first.hidden_size + second.hidden_size,
        "transformer_layers_per_block": [choose.choice([1, 2]) for _ in range(levels)],
        "attention_head_dim": [choose.choice([2, 4]) for _ in range(levels)],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": width,
        "projection_class_embeddings_input_dim": second.projection_dim + 6 * width,
    }
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=randomize(diffusers.AutoencoderKL(**VAE, scaling_factor=0.13025), 1),
        text_encoder=randomize(transformers.CLIPTextModel(first), 2),
        text_encoder_2=randomize(transformers.CLIPTextModelWithProjection(second), 3),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        unet=randomize(diffusers.UNet2DConditionModel(**(fields | unet)), 4),
        scheduler=scheduler or diffusers.EulerDiscreteScheduler(**SCHEDULER),
        **(index or {}),
    )
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def change(file: Path, **values: Any) -> None:
    """Change fields of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
