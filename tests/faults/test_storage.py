"""Full disks, stale files, modes, and what is written where there is nothing to write."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from torch import Tensor

from ldm_cli.errors import StorageError
from ldm_cli.formats import weight_files
from ldm_cli.training.checkpoint import checkpoint_name, checkpoints, problem_with

from ..training.toy import ToyTask, batches
from .runs import assert_same_run, configured, die, run, until

_Usage = namedtuple("_Usage", "total used free")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "No space left on device"),
        (OSError(errno.EFBIG, os.strerror(errno.EFBIG)), "File too large"),
        (OSError(errno.EIO, os.strerror(errno.EIO)), "Input/output error"),
    ],
)
def test_a_save_that_fails_leaves_the_older_checkpoint_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def full(values: Any, file: Path, metadata: Any) -> None:
        file.write_bytes(b"half")
        raise error

    def begin() -> None:
        while not (tmp_path / "broken/checkpoints" / checkpoint_name(5)).exists():
            time.sleep(0.001)
        patch.setattr(weight_files, "save_file", full)

    with (
        monkeypatch.context() as patch,
        pytest.raises(StorageError, match=rf"{words} \(it takes [\d.]+ [KM]iB, [\d.]+ [MGT]iB are free\)") as caught,
    ):
        run(tmp_path / "broken", source=until(7, begin))
    assert caught.value.code == 74
    assert [p.name for p in checkpoints(tmp_path / "broken/checkpoints")] == [checkpoint_name(5)]
    assert problem_with(tmp_path / "broken/checkpoints" / checkpoint_name(5)) is None
    assert not list((tmp_path / "broken").rglob(".tmp-*"))
    run(tmp_path / "broken")
    run(tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "broken", 20)


def test_a_run_without_room_for_a_checkpoint_is_refused_before_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: _Usage(1000, 999, 1))
    task = ToyTask()
    with pytest.raises(StorageError, match=r"no room for 3 checkpoints .* takes [\d.]+ [KM]iB, and 1 bytes are free"):
        run(tmp_path, task=task)
    assert task.seen == []


def test_the_next_life_clears_away_what_a_killed_one_left(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, source=until(7, die))
    for stale in ("checkpoints/.tmp-step-00000010", ".tmp-model", ".tmp-old-model", "samples/.tmp-step-00000003"):
        (tmp_path / stale / "ema").mkdir(parents=True)
        (tmp_path / stale / "ema" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".tmp-status.json").write_text("{")
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 7, "lo')
    run(tmp_path)
    assert not list(tmp_path.rglob(".tmp-*"))
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [7, 14, 20]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        run(tmp_path, configured(steps=1))
    finally:
        os.umask(before)
    checkpoint = tmp_path / "checkpoints" / checkpoint_name(1)
    modes = {f.name: f.stat().st_mode & 0o777 for f in checkpoint.iterdir() if f.is_file()}
    assert modes["training.safetensors"] == modes["state.json"] == modes["manifest.json"] == 0o666 & ~umask


class BlankTask(ToyTask):
    def picture(self, folder: Path | None) -> None:
        """Nothing to draw."""


def test_no_folder_is_made_where_there_is_nothing_to_draw(tmp_path: Path) -> None:
    run(tmp_path / "blank", configured(sample_every=5), BlankTask())
    run(tmp_path / "drawn", configured(sample_every=5))
    assert list((tmp_path / "blank" / "samples").iterdir()) == []
    assert len(list((tmp_path / "drawn" / "samples").iterdir())) == 4


def test_the_rate_counts_training_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    class SlowTask(ToyTask):
        def validate(self) -> dict[str, float]:
            nonlocal now
            now += 1000.0
            return super().validate()

    def source(start: int, end: int) -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal now
        for batch in batches(start, end):
            now += 2.0
            yield batch

    run(tmp_path, configured(steps=20, log_every=10, validate_every=4, save_every=3), SlowTask(), source)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = [line["images_per_second"] for line in lines if "images_per_second" in line]
    assert rates == [12 / 2.0, 12 / 2.0], "12 images in each step of 2 s, whatever lies between the steps"
