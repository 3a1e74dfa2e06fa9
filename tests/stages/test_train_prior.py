"""`ldm train-prior` on drawn scenes: what it measures, learns, resumes and writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_cli.data.loader import Loader
from ldm_cli.data.open_shards import open_shards
from ldm_cli.errors import CheckpointError, DataError, RecipeError
from ldm_cli.evaluation.clip_features import CLIPFeatures
from ldm_cli.families.open_family import open_family
from ldm_cli.families.prior import open_prior
from ldm_cli.formats.model_source import load_tensors
from ldm_cli.recipe.prior_recipe import TrainPriorRecipe
from ldm_cli.reporting import SilentReporter
from ldm_cli.storage import file_sha256

from ..faults.runs import metrics
from .tiny import cached, clip_recipe, lose_after, losses, prior_recipe, trained

WEIGHTS = "model/prior/diffusion_pytorch_model.safetensors"
TRAIN = {"lr": 1e-2, "ema_decay": 0.9}


@pytest.fixture(scope="module")
def run(scenes: Path, clip_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prior") / "run"
    trained(prior_recipe(scenes, clip_run / "model", **TRAIN), out)
    return out


def test_the_loss_falls_and_embeddings_are_compared_with_the_true_ones(run: Path) -> None:
    logged = losses(run)
    assert logged[-1] < logged[0]
    last = metrics(run)[-1]
    names = ["val_cosine", "val_text_cosine", "val_random_cosine"]
    assert {"val_loss", *names, *(f"{name}_error" for name in names)} <= last.keys()
    assert all(-1 <= last[f"val_cosine/level{i}"] <= 1 for i in range(5))
    assert last["val_text_cosine"] == last["val_text_cosine_ema"], "CLIP's own, whatever the prior is"
    assert last["val_cosine"] != last["val_random_cosine"]


def test_mean_and_deviation_are_those_of_the_training_pictures(run: Path, scenes: Path, clip_run: Path) -> None:
    """As the first epoch has them, but for the last of 64 that fill no part of a batch: there is none."""
    recipe = TrainPriorRecipe.from_mapping(prior_recipe(scenes, clip_run / "model"))
    shards = open_shards(recipe.data.shards, recipe.data, SilentReporter())
    batches = Loader(shards, recipe.data, seed=0, batch_size=8, with_captions=False).batches(0, 8)
    features = CLIPFeatures.load(clip_run / "model", torch.device("cpu"))
    expected = torch.cat([features.images(batch.images) for batch in batches])
    prior = open_prior(run / "model", "cpu", "fp32").denoiser
    torch.testing.assert_close(prior.clip_mean[0], expected.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(prior.clip_std[0], expected.std(0), rtol=1e-5, atol=1e-6)
    assert not prior.clip_mean.requires_grad


def test_the_clip_is_passed_on_bit_for_bit(run: Path, clip_run: Path) -> None:
    clip = load_tensors(clip_run / "model")
    for name in ("image_encoder", "text_encoder"):
        passed = load_tensors(run / "model" / name)
        assert passed
        assert all(torch.equal(tensor, clip[key]) for key, tensor in passed.items())


def test_resume_equals_uninterrupted_run(run: Path, scenes: Path, clip_run: Path, tmp_path: Path) -> None:
    recipe = prior_recipe(scenes, clip_run / "model", **TRAIN)
    lose_after(5, recipe, tmp_path / "run")
    trained(recipe, tmp_path / "run")
    assert file_sha256(tmp_path / "run" / WEIGHTS) == file_sha256(run / WEIGHTS)
    assert metrics(tmp_path / "run")[-1]["val_cosine"] == metrics(run)[-1]["val_cosine"]


def test_a_cache_changes_nothing(run: Path, scenes: Path, clip_run: Path, tmp_path: Path) -> None:
    recipe = cached(prior_recipe(scenes, clip_run / "model", **TRAIN), tmp_path / "cache")
    trained(recipe, tmp_path / "run")
    assert file_sha256(tmp_path / "run" / WEIGHTS) == file_sha256(run / WEIGHTS)


def test_a_cache_is_stale_when_the_clip_changes(scenes: Path, tmp_path: Path) -> None:
    for name in ("one", "other"):
        trained(clip_recipe(scenes, steps=1) | {"seed": len(name)}, tmp_path / name)
    recipe = cached(prior_recipe(scenes, tmp_path / "one/model", steps=2), tmp_path / "cache")
    with pytest.raises(DataError, match=r"stale: clip was .* and is "):
        trained(recipe | {"clip": str(tmp_path / "other/model")}, tmp_path / "run")


@pytest.mark.parametrize("change", [{"gradient_checkpointing": True}, {"micro_batch": 4}], ids=str)
def test_memory_is_saved_without_another_result(
    change: dict[str, Any], scenes: Path, clip_run: Path, tmp_path: Path
) -> None:
    for name, train in (("plain", {}), ("saved", change)):
        trained(prior_recipe(scenes, clip_run / "model", steps=3, lr=1e-2, **train), tmp_path / name)
    expected, found = (losses(tmp_path / name) for name in ("plain", "saved"))
    assert found == pytest.approx(expected, rel=1e-4)
    assert len(found) > 0


def test_training_begins_at_a_trained_prior_and_keeps_its_statistics(
    run: Path, scenes: Path, clip_run: Path, tmp_path: Path
) -> None:
    data = {"shards": str(scenes / "val-*.tar")}
    recipe = prior_recipe(scenes, clip_run / "model", data, steps=1, lr=1e-9)
    del recipe["prior"]
    trained(recipe | {"start_from": str(run)}, tmp_path / "run")
    before, after = (load_tensors(folder / "model/prior") for folder in (run, tmp_path / "run"))
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6)
    assert torch.equal(after["clip_mean"], before["clip_mean"])


def test_a_prior_is_no_model_to_sample_from(run: Path) -> None:
    join = rf"a prior alone: .* join them by 'ldm convert DECODER OUT --prior {run}/model', and take OUT"
    with pytest.raises(CheckpointError, match=join):
        open_family(run)


BAD: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda recipe: recipe.pop("clip"), "clip: missing"),
    (lambda recipe: recipe.pop("prior"), "prior: missing"),
    (lambda recipe: recipe["prior"].update(dropout=0.1), "dropout"),
    (lambda recipe: recipe.update(diffusion={"prediction_type": "epsilon"}), "prediction_type=sample"),
    (lambda recipe: recipe["data"].update(mask="json:x"), "data.mask has no meaning"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_impossible_recipes_are_refused(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    recipe = prior_recipe(Path("x"), Path("y"))
    change(recipe)
    with pytest.raises(ValueError, match=message):
        TrainPriorRecipe.from_mapping(recipe)


def test_a_prior_of_another_size_than_the_clips_is_refused(scenes: Path, clip_run: Path, tmp_path: Path) -> None:
    recipe = prior_recipe(scenes, clip_run / "model")
    recipe["prior"] |= {"embedding_dim": 12}
    with pytest.raises(RecipeError, match=r"prior.embedding_dim=12, but the text tower's projection_dim is 16"):
        trained(recipe, tmp_path)
