"""A run whose numbers are no longer finite names the steps that it skipped, and their samples."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_cli.cli.app import run as ldm_run
from ldm_cli.core.models.autoencoder_kl import Decoder
from ldm_cli.data.scenes import write_scenes
from ldm_cli.reporting import SilentReporter
from ldm_cli.training.checkpoint import checkpoints, problem_with

from ..stages.tiny import vae_recipe
from ..training.forked import ForkedRanks


def poison(after: int, times: int) -> None:
    """From now on this process computes not-a-number in so many calls of the decoder, after some good ones."""
    calls = itertools.count()

    def spoil(module: torch.nn.Module, given: object, result: torch.Tensor) -> torch.Tensor | None:
        if isinstance(module, Decoder) and after <= next(calls) < after + times:
            return result * math.nan
        return None

    torch.nn.modules.module.register_module_forward_hook(spoil)


def trained(
    folder: Path, world_size: int, in_rank: Callable[[int], None] = lambda rank: None, **train: Any
) -> tuple[list[int], str]:
    """Exit codes of the ranks, each of which began with `in_rank`, and what the first one said."""
    write_scenes(folder / "scenes", 20, 32, 0, SilentReporter(), val_samples=2)
    recipe = vae_recipe(folder / "scenes", steps=9, save_every=1, log_every=1, weight_decay=0.0, **train)
    (folder / "r.json").write_text(json.dumps(recipe))
    given = ["train-vae", str(folder / "r.json"), "--out", str(folder / "run"), "--device", "cpu"]
    given += ["--data-trace", str(folder / "trace")]

    def work(rank: int) -> int:
        in_rank(rank)
        return ldm_run(given)

    with ForkedRanks(work, folder, world_size) as job:
        return job.wait(), job.words()[0]


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_samples_of_skipped_steps_are_noted(tmp_path: Path, world_size: int) -> None:
    # The first update leaves weights of 1e25, whose images have squares beyond float32.
    codes, words = trained(tmp_path, world_size, lr=1e25, max_nonfinite=2)
    assert codes == [80] * world_size, words
    assert ("first in the output of vae." if world_size == 1 else "somewhere in the model") in words
    lines, log = (tmp_path / "trace").read_text().splitlines(), (tmp_path / "run/log.txt").read_text()
    for step in (2, 3, 4):
        assert f"warning: step {step} was skipped: loss or gradient is not finite" in log
        assert f"step {step} was skipped" in words
        names = ", ".join(line.split(" ", 1)[1].replace(" ", "/", 1) for line in lines if line.startswith(f"{step} "))
        assert f"samples of step {step}: {names}\n" in log
    assert "step 1 was skipped" not in log
    found = checkpoints(tmp_path / "run/checkpoints")
    assert [(folder.name, problem_with(folder)) for folder in found] == [
        ("step-00000002", None),
        ("step-00000003", None),
    ]


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_weights_that_an_update_makes_infinite_are_not_saved(tmp_path: Path, world_size: int) -> None:
    codes, words = trained(tmp_path, world_size, lr=1e39)
    assert codes == [80] * world_size, words
    assert "some weights are no longer finite" in words
    assert checkpoints(tmp_path / "run/checkpoints") == []


@pytest.mark.slow
def test_one_rank_with_a_loss_that_is_not_finite_skips_the_step_of_all(tmp_path: Path) -> None:
    codes, words = trained(tmp_path, 2, lambda rank: poison(after=2, times=1) if rank == 1 else None, max_nonfinite=2)
    assert codes == [0, 0], words
    assert "step 3 was skipped: loss or gradient is not finite" in words
    lines = (tmp_path / "trace").read_text().splitlines()
    names = ", ".join(line.split(" ", 1)[1].replace(" ", "/", 1) for line in lines if line.startswith("3 "))
    assert f"samples of step 3: {names}\n" in (tmp_path / "run/log.txt").read_text()
    told = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in told if line.get("skipped")] == [3]


@pytest.mark.slow
def test_one_rank_that_never_has_a_finite_loss_again_ends_the_job(tmp_path: Path) -> None:
    codes, words = trained(tmp_path, 2, lambda rank: poison(after=4, times=99) if rank == 1 else None, max_nonfinite=2)
    assert codes == [80, 80], words
    found = checkpoints(tmp_path / "run/checkpoints")
    assert [(folder.name, problem_with(folder)) for folder in found][-1] == ("step-00000006", None)


def test_a_run_never_ends_in_numbers_that_are_none(tmp_path: Path) -> None:
    codes, words = trained(tmp_path, 1, lr=1e25, max_nonfinite=100)
    assert codes == [80], words
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "failed"
    assert not (tmp_path / "run/model").exists()
