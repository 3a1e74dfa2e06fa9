"""Damaged files of a run: mended from its checkpoints, with a line that says so."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_cli.errors import CheckpointError
from ldm_cli.formats.json_file import read_sealed
from ldm_cli.reporting import SilentReporter
from ldm_cli.training.interruption import StopRequest
from ldm_cli.training.loop import train
from ldm_cli.training.run_folder import RunFolder
from ldm_cli.training.run_identity import EVERY_BYTE, fingerprint_changes

from ..faults.runs import CONFIG, assert_same_run, die, until
from .toy import ToyTask, batches

CPU = torch.device("cpu")
RECIPE = {"train": {"lr": 0.01, "log_every": 7}}


def claimed(path: Path, recipe: Any = RECIPE, source: Any = batches) -> list[str]:
    """Train or continue a toy run; what it says."""
    reporter = SilentReporter()
    with RunFolder(path, reporter) as folder, StopRequest(None) as stop:
        if folder.finished() is None:
            folder.claim(recipe, "# recipe", {"data": "one"}, CPU)
            train(ToyTask(), source, CONFIG, folder, reporter, device=CPU, stop=stop)
    return [message for message in reporter.messages if message.startswith("warning: ")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "whole"
    assert claimed(path) == []
    return path


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def nulled(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def not_utf_8(file: Path) -> None:
    file.write_bytes(b"\xff" + file.read_bytes())


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


DAMAGES = [emptied, nulled, not_utf_8, flipped, fifo, Path.unlink]
Damage = Callable[[Path], None]


@pytest.mark.parametrize("damage", DAMAGES)
def test_metrics_of_a_run_under_way_are_mended(whole: Path, tmp_path: Path, damage: Damage) -> None:
    with pytest.raises(KeyboardInterrupt):
        claimed(tmp_path / "run", source=until(12, die))
    damage(tmp_path / "run/metrics.jsonl")
    assert claimed(tmp_path / "run") == [
        f"warning: '{tmp_path}/run/metrics.jsonl' was damaged: its lines are taken from the checkpoint"
    ]
    assert_same_run(whole, tmp_path / "run", 20)


@pytest.mark.parametrize("damage", DAMAGES[:4])
@pytest.mark.parametrize("name", ["metrics.jsonl", "status.json", "model/model.safetensors"])
def test_a_finished_run_is_mended(whole: Path, tmp_path: Path, damage: Damage, name: str) -> None:
    claimed(tmp_path / "run")
    assert (before := read_sealed(tmp_path / "run/status.json")) is not None
    damage(tmp_path / "run" / name)
    assert len(claimed(tmp_path / "run")) == 1
    assert_same_run(whole, tmp_path / "run", 20)
    after = read_sealed(tmp_path / "run/status.json")
    assert after is not None
    assert after["figures"] == before["figures"]


@pytest.mark.parametrize("name", ["status.json", "model/model.safetensors"])
def test_a_finished_run_that_cannot_be_mended_does_not_start_again(tmp_path: Path, name: str) -> None:
    claimed(tmp_path / "run")
    for checkpoint in (tmp_path / "run/checkpoints").iterdir():
        checkpoint.rename(tmp_path / checkpoint.name)
    assert claimed(tmp_path / "run") == [], "whole without checkpoints"
    flipped(tmp_path / "run" / name)
    with pytest.raises(CheckpointError, match=r"damaged.*no checkpoint to go on from"):
        claimed(tmp_path / "run")


@pytest.mark.parametrize("damage", DAMAGES[:4])
def test_a_damaged_recipe_of_a_run_is_taken_from_its_checkpoints(whole: Path, tmp_path: Path, damage: Damage) -> None:
    with pytest.raises(KeyboardInterrupt):
        claimed(tmp_path / "run", source=until(12, die))
    file = tmp_path / "run/recipe.resolved.yaml"
    before = json.loads(file.read_text())
    damage(file)
    with pytest.raises(CheckpointError, match=r"train\.lr: 0\.01 → 0\.02"):
        claimed(tmp_path / "run", {"train": {"lr": 0.02, "log_every": 7}})
    assert claimed(tmp_path / "run") == [f"warning: '{file}' was damaged: it is written again"]
    assert json.loads(file.read_text()) == before
    assert_same_run(whole, tmp_path / "run", 20)
    for copy in [file, *(tmp_path / "run/checkpoints").glob(f"*/{file.name}")]:
        damage(copy)
    with pytest.raises(CheckpointError, match="does not say which run this is"):
        RunFolder(tmp_path / "run", SilentReporter()).recorded()


def test_a_run_without_checkpoints_has_nothing_to_lose(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        claimed(tmp_path / "run", source=until(3, die))
    emptied(tmp_path / "run/recipe.resolved.yaml")
    assert len(claimed(tmp_path / "run")) == 1
    assert_same_run(whole, tmp_path / "run", 20)


def test_the_hash_of_every_byte_is_compared_if_the_run_began_with_it() -> None:
    begun = {"data": "a", EVERY_BYTE: "b"}
    assert fingerprint_changes({"data": "a"}, begun) == []
    assert len(fingerprint_changes(begun, {"data": "a"})) == 1
    assert len(fingerprint_changes(begun, {"data": "a", EVERY_BYTE: "c"})) == 1


def test_a_run_that_has_logged_nothing_yet_is_not_called_damaged(tmp_path: Path) -> None:
    reporter = SilentReporter()
    with RunFolder(tmp_path / "run", reporter) as folder:
        folder.metrics.copy(tmp_path / "metrics.jsonl", 0)
        folder.restore_metrics(tmp_path)
    assert reporter.messages == []
