"""An autoregressive model small enough for tests, with random but lively weights: 16 codes on a grid of 4 by 4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm_cli.core.models.llama import LlamaForCausalLM
from ldm_cli.core.models.llama_config import LlamaConfig, PictureTokens
from ldm_cli.core.models.vq_model import VQModel
from ldm_cli.core.models.vq_model_config import VQModelConfig
from ldm_cli.families.autoregressive import Autoregressive, CodeGrid
from ldm_cli.families.open_family import open_family
from ldm_cli.formats.model_source import weights_sha256
from ldm_cli.formats.save_model import save_model
from ldm_cli.sampling.token_pipeline import TokenPipeline
from tests.sampling.tiny import randomize, tiny_tokenizer

VQ: dict[str, Any] = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 3,
    "num_vq_embeddings": 16,
    "mid_block_add_attention": False,
}
TRANSFORMER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def save_tiny_vq(folder: Path, seed: int = 8) -> VQModel:
    """Write a VQ model with a factor of 2 and random weights."""
    vq = randomize(VQModel(VQModelConfig(**VQ)), seed)
    save_model(folder, vq.state_dict(), vq.config.to_hugging_face())
    return vq


def save_tiny_model(folder: Path, grid: tuple[int, int] = (4, 4), text_length: int = 12, **fields: Any) -> None:
    """Write an autoregressive model with random weights."""
    tokenizer, vq = tiny_tokenizer(), save_tiny_vq(folder / "vq")
    tokens = PictureTokens(
        text_length=text_length,
        image_token_offset=tokenizer.vocab_size,
        num_codes=VQ["num_vq_embeddings"],
        grid=grid,
        vq_sha256=weights_sha256(folder / "vq"),
    )
    sizes = {"vocab_size": tokens.vocab_size, "max_position_embeddings": tokens.length}
    ids = {"bos_token_id": tokenizer.start_id, "eos_token_id": tokens.end_id, "pad_token_id": tokenizer.pad_id}
    config = LlamaConfig(**(TRANSFORMER | sizes | ids | fields), ldm=tokens)
    transformer = randomize(LlamaForCausalLM(config), 9)
    Autoregressive(transformer, CodeGrid(vq), tokenizer).save(folder)


def tiny_token_pipeline(folder: Path, **fields: Any) -> TokenPipeline:
    save_tiny_model(folder, **fields)
    family = open_family(folder)
    assert isinstance(family, Autoregressive)
    return TokenPipeline(family)
