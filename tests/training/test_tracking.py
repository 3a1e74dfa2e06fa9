"""`train.track`: trackers hold what metrics.jsonl holds, whatever happens to the run or to the tracker."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ldm_cli.errors import UsageError
from ldm_cli.reporting import SilentReporter
from ldm_cli.training import tracking
from ldm_cli.training.config import TrainConfig
from ldm_cli.training.interruption import StopRequest
from ldm_cli.training.loop import train
from ldm_cli.training.mirror import TrackerName
from ldm_cli.training.run_folder import RunFolder

from ..faults.runs import die, until
from .toy import ToyTask, batches

PICTURE = (3, 200, 77)


class PaintingTask(ToyTask):
    """Writes a grid for its samples."""

    def picture(self, folder: Path | None) -> None:
        if folder is not None:
            Image.new("RGB", (4, 2), PICTURE).save(folder / "grid.png")


def run(path: Path, name: TrackerName, source: Any = batches) -> list[str]:
    """Train 30 steps, or go on; returns the warnings."""
    pytest.importorskip(name)
    config = TrainConfig(steps=30, batch_size=12, lr=1e-2, log_every=4, save_every=5, sample_every=10, track=(name,))
    path.mkdir(exist_ok=True)
    (path / "recipe.resolved.yaml").write_text('{"recipe": {"seed": 7}}')
    with RunFolder(path, SilentReporter()) as folder, StopRequest(None) as stop:
        said: list[str] = []
        folder.warn = said.append  # type: ignore[method-assign]
        train(PaintingTask(), source, config, folder, SilentReporter(), device=torch.device("cpu"), stop=stop)
    return said


def written(path: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return {line.pop("step"): line for line in lines}


def in_tensorboard(path: Path) -> tuple[dict[int, dict[str, float]], list[int]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path / "tensorboard")).Reload()
    found: dict[int, dict[str, float]] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            assert tag not in found.setdefault(event.step, {})  # not doubled
            found[event.step][tag] = event.value
    return found, [event.step for event in events.Images("samples")]


def records(file: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format after a header of 7 bytes; wandb has no reader in Python."""
    content, place, parts = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if (left := BLOCK - place % BLOCK) < 7:
            place += left
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def in_wandb(path: Path) -> tuple[dict[int, dict[str, float]], list[int]]:
    from wandb.proto import wandb_internal_pb2

    (file,) = path.glob("wandb/offline-run-*/*.wandb")
    found, pictures = dict[int, dict[str, float]](), list[int]()
    for content in records(file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        if record.WhichOneof("record_type") != "history":
            continue
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        step = record.history.step.num
        assert step not in found  # not doubled
        found[step] = {name: value for name, value in row.items() if not name.startswith(("_", "samples"))}
        pictures += [step] if any(name.startswith("samples") for name in row) else []
    return {step: row for step, row in found.items() if row}, pictures


BLOCK = 32768
READERS = {"tensorboard": in_tensorboard, "wandb": in_wandb}
each_tracker = pytest.mark.parametrize("name", READERS)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.mark.slow
@each_tracker
def test_a_tracker_holds_the_figures_of_a_run_that_was_broken_off_twice(name: TrackerName, tmp_path: Path) -> None:
    for step in (8, 23):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, name, until(step, die))
    assert run(tmp_path, name) == []
    found, pictures = READERS[name](tmp_path)
    expected = written(tmp_path)
    assert list(found) == list(expected) == [4, 8, 12, 16, 20, 24, 28, 30]
    for step, figures in expected.items():
        assert found[step] == pytest.approx(figures, rel=1e-6)
    assert pictures == [10, 20, 30]


@pytest.mark.slow
@each_tracker
def test_a_run_outlives_its_tracker_and_says_so_once(name: TrackerName, tmp_path: Path) -> None:
    def source(start: int, end: int) -> Iterator[Any]:
        for index, batch in enumerate(batches(start, end), start=start):
            if index == 6:
                (process,) = trackers
                os.killpg(process.pid, signal.SIGKILL)
                while process.poll() is None:
                    time.sleep(0.01)
            yield batch

    trackers: list[Any] = []
    popen = tracking.subprocess.Popen
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking.subprocess, "Popen", lambda *a, **k: trackers.append(popen(*a, **k)) or trackers[-1])
        said = run(tmp_path, name, source)
    assert [f"{name} failed" in line for line in said] == [True]
    assert len(written(tmp_path)) == 8


@pytest.mark.slow
@each_tracker
def test_a_tracker_that_cannot_write_stops_nothing(name: TrackerName, tmp_path: Path) -> None:
    (tmp_path / {"tensorboard": "tensorboard", "wandb": "wandb"}[name]).write_text("a file in the place of the folder")
    said = run(tmp_path, name)
    assert all("train.track" in line for line in said)
    assert len(said) <= 1
    assert len(written(tmp_path)) == 8


@pytest.mark.slow
@each_tracker
def test_a_run_outlives_the_full_disk_of_its_tracker_and_says_so_once(
    name: TrackerName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    popen = tracking.subprocess.Popen

    def popen_without_room(*arguments: Any, **options: Any) -> Any:
        process = popen(*arguments, **options)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (256, 256))  # its children inherit it
        return process

    monkeypatch.setattr(tracking.subprocess, "Popen", popen_without_room)
    said = run(tmp_path, name)
    assert [f"{name} failed" in line for line in said] == [True]
    assert len(written(tmp_path)) == 8


def test_a_tracker_that_is_not_installed_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="wandb is not installed; pip install wandb"):
        tracking.expect_trackers(["wandb"])
