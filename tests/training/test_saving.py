"""Checkpoints written beside the training: what goes on meanwhile, and what ends it."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from ldm_cli.errors import Preempted, StorageError
from ldm_cli.formats import weight_files
from ldm_cli.training.checkpoint import checkpoint_name, checkpoints, problem_with

from ..faults.runs import assert_same_run, configured, run, status, until
from .toy import ToyTask


class Disk:
    """Writes tensors once it is released, or fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        self.is_released, self.error = threading.Event(), error
        monkeypatch.setattr(weight_files, "save_file", self.write)

    def write(self, values: Any, file: Path, metadata: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            assert self.is_released.wait(60)
        if self.error is not None:
            raise self.error
        save_file(values, file, metadata)


def saved(path: Path, step: int) -> bool:
    return (path / "checkpoints" / checkpoint_name(step)).exists()


def is_saving() -> bool:
    return any(thread.name == "ldm-save" for thread in threading.enumerate())


def test_training_goes_on_while_a_checkpoint_of_an_earlier_step_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(keep_checkpoints=9)
    run(tmp_path / "undisturbed", config)
    disk = Disk(monkeypatch)

    def act() -> None:
        assert is_saving()
        assert not saved(tmp_path / "run", 5)
        assert status(tmp_path / "run")["step"] == 0
        disk.is_released.set()

    run(tmp_path / "run", config, source=until(9, act))
    for step in (5, 10, 15, 20):
        assert_same_run(tmp_path / "undisturbed", tmp_path / "run", step)
        assert problem_with(tmp_path / "run/checkpoints" / checkpoint_name(step)) is None


def test_a_second_save_waits_for_the_first_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, task = Disk(monkeypatch), ToyTask()

    def release() -> None:
        time.sleep(0.5)
        assert task.seen[-1] == 2
        assert not checkpoints(tmp_path / "checkpoints")
        disk.is_released.set()

    releasing = threading.Thread(target=release)
    run(tmp_path, configured(steps=4, save_every=1), task, until(1, releasing.start))
    releasing.join()
    assert [p.name for p in checkpoints(tmp_path / "checkpoints")] == [checkpoint_name(3), checkpoint_name(4)]


def test_a_signal_during_a_save_lets_it_finish_and_saves_the_step_that_is_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)

    def act() -> None:
        assert is_saving()
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Timer(0.3, disk.is_released.set).start()

    with pytest.raises(Preempted, match="stopped at step 8 of 20: received SIGTERM; checkpoint saved"):
        run(tmp_path, source=until(7, act))
    assert [p.name for p in checkpoints(tmp_path / "checkpoints")] == [checkpoint_name(5), checkpoint_name(8)]
    assert status(tmp_path)["step"] == 8
    assert not list(tmp_path.rglob(".tmp-*"))
    run(tmp_path)
    monkeypatch.undo()
    run(tmp_path / "undisturbed")
    assert_same_run(tmp_path / "undisturbed", tmp_path, 20)


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def wait_for_save() -> None:
    while is_saving():
        time.sleep(0.001)


@pytest.mark.parametrize(
    ("steps", "act", "seen"),
    [(20, wait_for_save, 8), (20, lambda: None, 10), (5, lambda: None, 5)],
    ids=["between", "at-the-next-save", "at-the-end"],
)
def test_a_save_that_fails_ends_the_run_at_its_next_step_or_save_or_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, act: Callable[[], None], seen: int
) -> None:
    Disk(monkeypatch, full()).is_released.set()
    task = ToyTask()
    with pytest.raises(StorageError, match=r"step-00000005': No space left on device \(it takes .* are free\)"):
        run(tmp_path, configured(steps=steps), task, until(7, act))
    assert 5 <= task.seen[-1] <= seen
    assert status(tmp_path)["state"] == "failed"
    assert not checkpoints(tmp_path / "checkpoints")
    assert not list(tmp_path.rglob(".tmp-*"))
    assert not (tmp_path / "model").exists()


def test_an_error_of_training_waits_for_the_save_and_stays_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)

    def act() -> None:
        threading.Timer(0.3, disk.is_released.set).start()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(tmp_path, source=until(7, act))
    assert problem_with(tmp_path / "checkpoints" / checkpoint_name(5)) is None
    assert not is_saving()
