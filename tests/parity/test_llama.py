"""The decoder-only Transformer against transformers' LlamaForCausalLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from transformers import AutoModelForCausalLM, LlamaForCausalLM as Theirs  # isort: skip

from ldm_cli.core.models.llama import KeyValueCache, LlamaForCausalLM
from ldm_cli.core.models.llama_config import LlamaConfig
from ldm_cli.formats.model_folder import load_model
from ldm_cli.formats.save_model import save_model
from ldm_cli.formats.weight_files import TRANSFORMERS_WEIGHTS
from tests.sampling.tiny import randomize

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "bos_token_id": 0,
    "eos_token_id": 49,
}
KINDS = [{}, {"num_key_value_heads": 2}, {"tie_word_embeddings": True}, {"head_dim": 6, "rope_theta": 500.0}]


def both(folder: Path, **fields: Any) -> tuple[LlamaForCausalLM, Theirs]:
    """Our model, saved, and theirs of the same folder."""
    ours = randomize(LlamaForCausalLM(LlamaConfig(**(SIZES | fields))), 0)
    save_model(folder, ours.state_dict(), ours.config.to_hugging_face(), TRANSFORMERS_WEIGHTS)
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    assert isinstance(theirs, Theirs)
    return ours, theirs


def ids(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 49, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("fields", KINDS)
@torch.inference_mode()
def test_logits_are_those_of_transformers(fields: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = both(tmp_path, **fields)
    tokens = ids(3, 24)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fields", KINDS)
@torch.inference_mode()
def test_our_model_reads_a_folder_of_transformers(fields: dict[str, Any], tmp_path: Path) -> None:
    _, theirs = both(tmp_path / "ours", **fields)
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_model(LlamaForCausalLM, tmp_path / "theirs").eval()
    torch.testing.assert_close(again(ids(2, 9)), theirs(ids(2, 9)).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fields", KINDS)
@pytest.mark.parametrize("is_static", [False, True])
@torch.inference_mode()
def test_cached_logits_equal_uncached_ones(fields: dict[str, Any], is_static: bool) -> None:
    model = randomize(LlamaForCausalLM(LlamaConfig(**(SIZES | fields))), 2)
    tokens = ids(2, 17)
    cache = KeyValueCache(model.config, 2, 20, model.head_weight, is_static=is_static)
    steps = [tokens[:, :6], *tokens[:, 6:14].split(1, dim=1), tokens[:, 14:]]
    cached = torch.cat([model(part, cache) for part in steps], dim=1)
    torch.testing.assert_close(cached, model(tokens), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_greedy_tokens_are_those_of_generate(tmp_path: Path) -> None:
    ours, theirs = both(tmp_path)
    prompt = ids(2, 7)
    expected = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False, eos_token_id=None
    )[:, 7:]
    cache, part, found = KeyValueCache(ours.config, 2, 27, ours.head_weight), prompt, []
    for _ in range(20):
        part = ours(part, cache)[:, -1:].argmax(-1)
        found.append(part)
    assert torch.equal(torch.cat(found, dim=1), expected)
