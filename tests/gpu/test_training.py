"""Trainers on a CUDA device, against the CPU."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ldm_cli.training.trainer import Trainer

from ..rehearsal.conftest import parts as parts  # a fixture
from ..rehearsal.test_steps import TRAINERS, recipe_of
from ..stages.tiny import lose_after, losses, trained, vae_recipe

pytestmark = pytest.mark.gpu


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("trainer", TRAINERS)
def test_losses_are_those_of_the_cpu(trainer: str, parts: Path, tmp_path: Path) -> None:
    recipe = recipe_of(trainer, parts, steps=6, log_every=1, precision="fp32")
    for device in ("cuda", "cpu"):
        trained(recipe, tmp_path / device, device=device)
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-3)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("trainer", TRAINERS)
def test_no_step_waits_for_the_device(
    trainer: str, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = Trainer.advance

    def watched(self: Trainer, batch: Any) -> None:
        torch.cuda.set_sync_debug_mode("error" if self.step else "default")
        try:
            advance(self, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "advance", watched)
    assert trained(recipe_of(trainer, parts), tmp_path / "run", device="cuda")["state"] == "finished"


def test_bf16_is_the_default_and_the_run_names_its_device(cuda: torch.device, parts: Path, tmp_path: Path) -> None:
    trained(recipe_of("vae", parts), tmp_path / "run", device="cuda")
    resolved = json.loads((tmp_path / "run/recipe.resolved.yaml").read_text())
    assert resolved["recipe"]["train"]["precision"] == "bf16"
    assert resolved["fingerprints"]["device"] == "cuda"
    assert json.loads((tmp_path / "run/env.json").read_text())["device"] == torch.cuda.get_device_name(cuda)


@pytest.mark.usefixtures("exact_products")
def test_a_run_that_is_lost_and_continued_ends_the_same(parts: Path, tmp_path: Path) -> None:
    recipe = recipe_of("unet from images", parts, steps=6, save_every=2, precision="fp32")
    trained(recipe, tmp_path / "whole", device="cuda")
    lose_after(4, recipe, tmp_path / "halves", device="cuda")
    trained(recipe, tmp_path / "halves", device="cuda")
    weights = "model/unet/diffusion_pytorch_model.safetensors"
    whole, halves = load_file(tmp_path / "whole" / weights), load_file(tmp_path / "halves" / weights)
    for name, tensor in whole.items():
        torch.testing.assert_close(halves[name], tensor, rtol=0, atol=1e-5, msg=name)


def test_a_smaller_micro_batch_takes_less_memory(cuda: torch.device, parts: Path, tmp_path: Path) -> None:
    model = {"block_out_channels": [64, 64], "norm_num_groups": 32}
    peaks = {}
    for size in (32, 4):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(cuda)
        train = {"steps": 2, "batch_size": 32, "micro_batch": size}
        trained(vae_recipe(parts / "scenes", vae=model, **train), tmp_path / str(size), device="cuda")
        peaks[size] = torch.cuda.max_memory_allocated(cuda)
    assert peaks[4] < 0.5 * peaks[32]


@pytest.mark.usefixtures("cuda")
def test_compiled_blocks_train_as_plain_ones(parts: Path, tmp_path: Path) -> None:
    train: Mapping[str, Any] = {"steps": 4, "log_every": 1, "precision": "fp32"}
    for compiled in (True, False):
        recipe = recipe_of("unet from cache", parts, compile=compiled, **train)
        trained(recipe, tmp_path / str(compiled), device="cuda")
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), rel=1e-2)
