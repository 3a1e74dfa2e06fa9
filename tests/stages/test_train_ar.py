"""`ldm train-ar` on drawn scenes: its loss, caches, resuming, starting from a model, and the folder it writes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ldm_cli.core.models.llama_config import PictureTokens
from ldm_cli.core.token_loss import sequences, token_losses
from ldm_cli.errors import DataError, RecipeError
from ldm_cli.families.autoregressive import Autoregressive
from ldm_cli.families.open_family import open_family
from ldm_cli.recipe.ar_recipe import TrainArRecipe
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.pipeline_of import pipeline_of
from ldm_cli.sampling.request import requests_for
from ldm_cli.storage import file_sha256
from tests.sampling.tiny_ar import save_tiny_vq
from tests.stages.tiny import ar_recipe, cached, lose_after, losses, trained

WEIGHTS = "model/transformer/model.safetensors"
TOKENS = PictureTokens(text_length=5, image_token_offset=10, num_codes=4, grid=(1, 3), vq_sha256="x")


@pytest.fixture(scope="module")
def vq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vq")
    save_tiny_vq(folder)
    return folder


@pytest.fixture(scope="module")
def run(scenes: Path, vq: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The codes of 256 places are those of a random VQ model: smooth pictures repeat them."""
    out = tmp_path_factory.mktemp("ar") / "run"
    trained(ar_recipe(scenes, vq, lr=1e-2, ema_decay=0.9), out)
    return out


def test_the_loss_of_each_part_is_the_cross_entropy_of_its_tokens() -> None:
    captions = torch.tensor([[8, 1, 9, 9, 9], [8, 1, 2, 3, 9]])
    ids = sequences(captions, torch.tensor([[[[0, 3, 1]]], [[[2, 2, 0]]]]), TOKENS)
    assert ids.tolist() == [[8, 1, 9, 9, 9, 14, 10, 13, 11, 15], [8, 1, 2, 3, 9, 14, 12, 12, 10, 15]]
    logits = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    nats = -logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    found = token_losses(logits, ids, TOKENS, text_end=9)
    torch.testing.assert_close(found.text, torch.stack([nats[0, :2].mean(), nats[1, :4].mean()]))
    torch.testing.assert_close(found.codes, nats[:, 5:8].mean(1))
    torch.testing.assert_close(found.end, nats[:, 8])


def test_training_learns_and_writes_a_folder_that_samples(run: Path) -> None:
    figures = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validated = [line for line in figures if "val_bits_per_image_token" in line]
    assert losses(run)[-1] < losses(run)[0]
    assert 0 < validated[-1]["val_bits_per_image_token"] < 7, "of 9.2 for 578 tokens"
    assert 0 < validated[-1]["val_bits_per_text_token"] < math.log2(578)
    family = open_family(run)
    assert isinstance(family, Autoregressive)
    config = SamplingConfig(guidance=2.0, images_per_prompt=2)
    [first, second] = pipeline_of(family).generate(requests_for(["a red circle"], config), config)
    assert first.pixels.shape == (3, 32, 32)
    assert not torch.equal(first.pixels, second.pixels)
    assert len(list(run.glob("samples/*/grid.png"))) > 0
    theirs = AutoModelForCausalLM.from_pretrained(run / "model/transformer")
    assert theirs.config.ldm["grid"] == [16, 16]


def test_resume_equals_uninterrupted_run(run: Path, scenes: Path, vq: Path, tmp_path: Path) -> None:
    recipe = ar_recipe(scenes, vq, lr=1e-2, ema_decay=0.9)
    lose_after(5, recipe, tmp_path / "run")
    trained(recipe, tmp_path / "run")
    assert file_sha256(tmp_path / "run" / WEIGHTS) == file_sha256(run / WEIGHTS)


def test_a_cache_of_codes_changes_nothing(run: Path, scenes: Path, vq: Path, tmp_path: Path) -> None:
    recipe = cached(ar_recipe(scenes, vq, lr=1e-2, ema_decay=0.9), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("text-*"))
    trained(recipe, tmp_path / "run")
    assert file_sha256(tmp_path / "run" / WEIGHTS) == file_sha256(run / WEIGHTS)


def test_a_cache_is_stale_when_the_vq_model_changes(scenes: Path, tmp_path: Path) -> None:
    save_tiny_vq(tmp_path / "vq")
    recipe = cached(ar_recipe(scenes, tmp_path / "vq", steps=2), tmp_path / "cache")
    save_tiny_vq(tmp_path / "vq", seed=1)
    with pytest.raises(DataError, match=r"stale: vq was .* and is "):
        trained(recipe, tmp_path / "run")


@pytest.mark.parametrize("change", [{"gradient_checkpointing": True}, {"micro_batch": 4}], ids=str)
def test_memory_is_saved_without_another_result(change: dict[str, Any], scenes: Path, vq: Path, tmp_path: Path) -> None:
    for name, train in (("plain", {}), ("saved", change)):
        trained(ar_recipe(scenes, vq, steps=3, lr=1e-2, **train), tmp_path / name)
    expected, found = (losses(tmp_path / name) for name in ("plain", "saved"))
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(found) > 0


def test_dropped_captions_do_not_matter(scenes: Path, vq: Path, tmp_path: Path) -> None:
    recipe = ar_recipe(scenes, vq, steps=3, log_every=1) | {"caption_dropout": 1.0}
    trained(recipe, tmp_path / "one")
    trained(recipe | {"text_loss_weight": 5.0}, tmp_path / "other")
    assert losses(tmp_path / "one") == losses(tmp_path / "other")


def test_training_begins_at_a_trained_model(run: Path, scenes: Path, tmp_path: Path) -> None:
    recipe = ar_recipe(scenes, Path("unused"), steps=1, lr=1e-9)
    for name in ("vq", "tokenizer", "text_length", "transformer"):
        del recipe[name]
    trained(recipe | {"start_from": str(run)}, tmp_path / "run")
    before, after = (open_family(folder) for folder in (run, tmp_path / "run"))
    assert isinstance(before, Autoregressive)
    assert isinstance(after, Autoregressive)
    assert before.tokens == after.tokens
    for ours, theirs in zip(before.transformer.parameters(), after.transformer.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_a_start_with_other_codes_is_refused(run: Path, scenes: Path, tmp_path: Path) -> None:
    save_tiny_vq(tmp_path / "vq", seed=1)
    recipe = ar_recipe(scenes, tmp_path / "vq", steps=1) | {"start_from": str(run)}
    del recipe["tokenizer"]
    with pytest.raises(RecipeError, match="start_from has other tokens: vq_sha256 was"):
        trained(recipe, tmp_path / "run")


BAD: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda recipe: recipe["transformer"].update(num_attention_heads=3), "no multiple of 3 heads"),
    (lambda recipe: recipe["transformer"].update(num_key_value_heads=3), "no multiple of num_key_value_heads=3"),
    (lambda recipe: recipe["data"].update(mask="json:x"), "data.mask has no meaning"),
    (lambda recipe: recipe.pop("vq"), "vq: missing"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_impossible_recipes_are_refused(change: Callable[[dict[str, Any]], Any], message: str, vq: Path) -> None:
    recipe = ar_recipe(Path("x"), vq)
    recipe["transformer"] = dict(recipe["transformer"])
    change(recipe)
    with pytest.raises(ValueError, match=message):
        TrainArRecipe.from_mapping(recipe)
