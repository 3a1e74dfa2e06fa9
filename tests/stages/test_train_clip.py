"""`train-clip` on drawn scenes: it learns, its folder is transformers', and batches may be run in parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm_cli.core.clip_loss import contrastive_loss
from ldm_cli.core.models.clip import CLIPModel
from ldm_cli.core.models.clip_image_processor import CLIPImageProcessor
from ldm_cli.core.models.clip_resnet import ModifiedResNet
from ldm_cli.data.batch import Batch
from ldm_cli.data.loader import Loader
from ldm_cli.data.tokenizer import Tokenizer
from ldm_cli.errors import CheckpointError, InputNotFoundError
from ldm_cli.formats.model_folder import load_model
from ldm_cli.recipe.schema import TrainClipRecipe
from ldm_cli.stages.train_clip import CLIPTask

from ..faults.runs import tensors
from .tiny import RESNET, VIT, assert_resumes, clip_recipe, losses, trained, workbench


def task_and_batch(scenes: Path, path: Path, **changes: Any) -> tuple[CLIPTask, Batch]:
    recipe = TrainClipRecipe.from_mapping(clip_recipe(scenes, **changes))
    path.mkdir(exist_ok=True)
    bench = workbench(recipe, path)
    loader = Loader(bench.shards, recipe.data, seed=0, batch_size=8)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        task = CLIPTask(recipe, bench)
    return task, next(loader.batches(0, 1))


def gradients(
    task: CLIPTask, batch: Batch, num_parts: int, dtype: torch.dtype | None = None
) -> tuple[float, dict[str, Tensor]]:
    task.model.train().zero_grad()
    total = 0.0
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        parts = task.parts(task.prepare(batch), num_parts)
    for part in parts:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss, _ = task.loss(part, 1)
        (loss / num_parts).backward()
        total += loss.item() / num_parts
    return total, {n: p.grad.clone() for n, p in task.model.named_parameters() if p.grad is not None}


def test_the_loss_falls_below_chance_and_figures_are_logged(clip_run: Path) -> None:
    logged = losses(clip_run)
    assert logged[0] < 3.3, "the loss of a batch of 16 by chance is log 16 = 2.77"
    assert logged[-1] < logged[0] - 0.3
    last = json.loads((clip_run / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"accuracy", "grad_norm", "lr", "val_loss", "val_accuracy", "val_loss_ema"} <= last.keys()


def test_the_run_folder_has_the_promised_layout(clip_run: Path) -> None:
    files = {f.relative_to(clip_run).as_posix() for f in clip_run.rglob("*") if f.is_file()}
    model = {
        "config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json",
        "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    }  # fmt: skip
    checkpoint = "checkpoints/step-00000040"
    assert {f"model/{name}" for name in model} <= files
    assert {f"{checkpoint}/{kind}/{name}" for name in model for kind in ("model", "ema")} <= files
    assert {f"{checkpoint}/{n}" for n in ("training.safetensors", "state.json", "manifest.json")} <= files
    assert {
        "recipe.yaml", "recipe.resolved.yaml", "env.json", "status.json", "log.txt", "metrics.jsonl",
        "samples/step-00000040/grid.png", "samples/step-00000040/captions.json",
    } <= files  # fmt: skip


def test_transformers_opens_the_model_and_agrees(clip_run: Path, scenes: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPModel.from_pretrained(clip_run / "model").eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(clip_run / "model")
    ours = load_model(CLIPModel, clip_run / "model").eval()
    captions = ["a small red circle at the top left", "a blue square " * 20]
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ids, Tokenizer.load(clip_run / "model").encode(captions).input_ids)
    assert ids.shape == (2, 24), "the context length of the model, not CLIP's 77"
    pixels = CLIPImageProcessor.for_side(32)(torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8))
    with torch.no_grad():
        text, image, scale = ours(ids, pixels)
        output = theirs(input_ids=ids, pixel_values=pixels)
    normalized = [torch.nn.functional.normalize(feature, dim=-1) for feature in (image, text)]
    torch.testing.assert_close(normalized[0], output.image_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(normalized[1], output.text_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(scale * normalized[1] @ normalized[0].T, output.logits_per_text, rtol=0, atol=1e-4)


@pytest.mark.parametrize("num_parts", [2, 4])
def test_a_batch_in_parts_has_the_gradient_of_the_whole_batch(scenes: Path, tmp_path: Path, num_parts: int) -> None:
    task, batch = task_and_batch(scenes, tmp_path)
    loss, whole = gradients(task, batch, 1)
    same_loss, parts = gradients(task, batch, num_parts)
    assert same_loss == pytest.approx(loss, abs=1e-6)
    assert whole.keys() == parts.keys() == dict(task.model.named_parameters()).keys()
    assert whole["logit_scale"].abs() > 1e-4
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-6, msg=name)


def test_parts_under_autocast_train_every_parameter(scenes: Path, tmp_path: Path) -> None:
    task, batch = task_and_batch(scenes, tmp_path)
    _, whole = gradients(task, batch, 1, torch.bfloat16)
    _, parts = gradients(task, batch, 2, torch.bfloat16)
    assert whole.keys() == parts.keys() == dict(task.model.named_parameters()).keys()
    flat = [torch.cat([g.flatten() for g in one.values()]) for one in (whole, parts)]
    assert torch.nn.functional.cosine_similarity(flat[0], flat[1], dim=0) > 0.99


def test_logits_are_not_rounded_by_autocast() -> None:
    image, text = (torch.randn(6, 8, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    expected, _ = contrastive_loss(image, text, torch.tensor(100.0))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = contrastive_loss(image, text, torch.tensor(100.0))
    assert torch.equal(loss, expected)


def test_batch_statistics_count_each_part_once(scenes: Path, tmp_path: Path) -> None:
    task, batch = task_and_batch(scenes, tmp_path, vision=RESNET)
    assert isinstance(task.model.vision_model, ModifiedResNet)
    gradients(task, batch, 4)
    assert task.model.vision_model.bn1.num_batches_tracked == 4


def test_validation_is_in_evaluation_mode_and_changes_no_statistics(scenes: Path, tmp_path: Path) -> None:
    """A held-out figure is a function of the weights: the same whatever came before."""
    recipe = clip_recipe(scenes, vision=RESNET, steps=4, save_every=2)
    trained(recipe, tmp_path / "often")
    trained(clip_recipe(scenes, vision=RESNET, steps=4, save_every=2, validate_every=1), tmp_path / "more")
    often, more = tensors(tmp_path / "often", 4), tensors(tmp_path / "more", 4)
    assert all(torch.equal(often[name], more[name]) for name in often)
    assert often["model/model.safetensors:vision_model.bn1.num_batches_tracked"] == 4


@pytest.mark.parametrize("vision", [VIT, RESNET], ids=["vit", "resnet"])
def test_a_run_that_is_lost_and_continued_ends_the_same(scenes: Path, tmp_path: Path, vision: dict[str, Any]) -> None:
    recipe = clip_recipe(scenes, vision, steps=6, ema_decay=0.9, micro_batch=4, save_every=2)
    assert_resumes(recipe, tmp_path, 4)


def test_a_finished_run_touches_nothing(scenes: Path, tmp_path: Path) -> None:
    recipe = clip_recipe(scenes, steps=2)
    first = trained(recipe, tmp_path / "run")
    paths = [tmp_path / "run", *(tmp_path / "run").rglob("*")]
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in paths}
    again = trained(recipe, tmp_path / "run")
    assert {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in paths} == before
    assert again == first
    with pytest.raises(CheckpointError, match="--resume never"):
        trained(recipe, tmp_path / "run", resume="never")
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "finished"
    with pytest.raises(CheckpointError, match=r"train\.lr"):
        trained(clip_recipe(scenes, steps=2, lr=1e-2), tmp_path / "run")
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "finished"


def test_missing_held_out_shards_fail_before_the_first_step(scenes: Path, tmp_path: Path) -> None:
    recipe = clip_recipe(scenes)
    recipe["data"]["val_shards"] = str(scenes / "nothing-*.tar")
    with pytest.raises(InputNotFoundError, match="nothing-"):
        trained(recipe, tmp_path / "run")
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["code"]) == ("failed", 66)
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_without_held_out_shards_there_is_neither_validation_nor_picture(scenes: Path, tmp_path: Path) -> None:
    recipe = clip_recipe(scenes, steps=2)
    recipe["data"]["val_shards"] = None
    figures = trained(recipe, tmp_path / "run")["figures"]
    assert "loss" in figures
    assert not [name for name in figures if name.startswith("val")]
    assert not list((tmp_path / "run").glob("samples/*"))


def test_a_bug_in_the_task_leaves_a_truthful_status(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: nn.Module, *inputs: Any) -> Tensor:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(CLIPModel, "get_image_features", broken)
    with pytest.raises(ZeroDivisionError):
        trained(clip_recipe(scenes), tmp_path / "run")
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["code"], status["error"]) == ("failed", 70, "ZeroDivisionError: a bug")
