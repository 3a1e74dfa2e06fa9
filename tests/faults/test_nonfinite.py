"""A run whose numbers are no longer finite names the steps that it skipped, and their samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ldm_cli.cli.app import run as ldm_run
from ldm_cli.data.scenes import write_scenes
from ldm_cli.reporting import SilentReporter
from ldm_cli.training.checkpoint import checkpoints, problem_with

from ..stages.tiny import vae_recipe
from ..training.forked import ForkedRanks


def trained(folder: Path, world_size: int, **train: Any) -> tuple[list[int], str]:
    """Exit codes of the ranks, and what the first one said."""
    write_scenes(folder / "scenes", 20, 32, 0, SilentReporter(), val_samples=2)
    recipe = vae_recipe(folder / "scenes", steps=9, save_every=1, log_every=1, weight_decay=0.0, **train)
    (folder / "r.json").write_text(json.dumps(recipe))
    given = ["train-vae", str(folder / "r.json"), "--out", str(folder / "run"), "--device", "cpu"]
    given += ["--data-trace", str(folder / "trace")]
    with ForkedRanks(lambda rank: ldm_run(given), folder, world_size) as job:
        return job.wait(), job.words()[0]


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_samples_of_skipped_steps_are_noted(tmp_path: Path, world_size: int) -> None:
    # The first update leaves weights of 1e25, whose images have squares beyond float32.
    codes, words = trained(tmp_path, world_size, lr=1e25, max_nonfinite=2)
    assert codes == [80] * world_size, words
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
