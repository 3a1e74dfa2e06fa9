"""Parts of what survives faults, one by one: links, mending, locks, journals, room, second signals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ldm_cli.errors import CheckpointError, OutputError, Preempted, StuckError
from ldm_cli.reporting import SilentReporter
from ldm_cli.training import checkpoint, failures, run_lock
from ldm_cli.training.checkpoint import commit_folder, latest_checkpoint, link_folder, problem_with
from ldm_cli.training.interruption import StopRequest
from ldm_cli.training.run_folder import RunFolder

from ..conftest import REPOSITORY
from ..training.toy import ToyTask
from .runs import configured, die, run, status, until


def _frozen(folder: Path) -> None:
    (folder / "vae").mkdir()
    (folder / "vae/weights").write_bytes(b"never trained")


def _linked_checkpoints(path: Path) -> list[Path]:
    commit_folder(path / "frozen", _frozen)
    (path / "checkpoints").mkdir()

    def write(folder: Path) -> None:
        (folder / "own").write_text(folder.name)
        for name in ("model", "ema"):
            link_folder(path / "frozen", folder / name)

    folders = [path / "checkpoints" / checkpoint.checkpoint_name(step) for step in (1, 2)]
    for folder in folders:
        commit_folder(folder, write, linked=path / "frozen")
    return folders


def test_what_is_frozen_is_stored_once_and_every_manifest_verifies(tmp_path: Path) -> None:
    folders = _linked_checkpoints(tmp_path)
    files = [f / name / "vae/weights" for f in folders for name in ("model", "ema")]
    assert len({file.stat().st_ino for file in files}) == 1
    assert [problem_with(folder) for folder in folders] == [None, None]
    assert not (folders[0] / "model/manifest.json").exists()


def test_all_of_a_checkpoint_is_synced_before_it_is_renamed_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, done = tmp_path / "step", []

    def write(folder: Path) -> None:
        (folder / "model").mkdir()
        (folder / "model/weights").write_bytes(b"x")

    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append(Path(f"/proc/self/fd/{descriptor}").readlink()))
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: (done.append("renamed"), rename(self, to))[1])
    commit_folder(target, write)
    temporary = tmp_path / ".tmp-step"
    manifest = temporary / ".tmp-manifest.json"  # which gets its name once it is synced
    *synced, renamed, last = done
    assert synced == [temporary / "model/weights", manifest, temporary / "model", temporary]
    assert (renamed, last) == ("renamed", tmp_path)


def test_without_links_there_are_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    folders = _linked_checkpoints(tmp_path)
    assert {(f / "model/vae/weights").stat().st_nlink for f in folders} == {1}
    assert [problem_with(folder) for folder in folders] == [None, None]


def test_a_linked_file_that_is_damaged_everywhere_is_mended_from_a_new_copy(tmp_path: Path) -> None:
    _, newest = _linked_checkpoints(tmp_path)
    with (tmp_path / "frozen/vae/weights").open("r+b") as stream:
        stream.write(b"N")
    said: list[str] = []
    with pytest.raises(CheckpointError, match="all 2 are damaged"):
        latest_checkpoint(tmp_path / "checkpoints", said.append, tmp_path / "frozen")
    commit_folder(tmp_path / "frozen", _frozen, replace=True)
    said.clear()
    assert latest_checkpoint(tmp_path / "checkpoints", said.append, tmp_path / "frozen") == newest
    assert said == [
        "checkpoint 'step-00000002' was damaged: 'ema/vae/weights' does not have the content of its sha256; "
        "mended 2 files"
    ]


def test_damage_to_a_linked_file_is_not_sealed_as_if_it_were_sound(tmp_path: Path) -> None:
    commit_folder(tmp_path / "frozen", _frozen)
    with (tmp_path / "frozen/vae/weights").open("r+b") as stream:
        stream.write(b"N")
    commit_folder(tmp_path / "copy", lambda f: link_folder(tmp_path / "frozen", f), linked=tmp_path / "frozen")
    assert problem_with(tmp_path / "copy") is not None


@pytest.mark.parametrize("content", ["", "{}", '{"files": {}}', '{"files": {"../x": {}}}', "[" * 100_000, "[]"])
def test_a_manifest_that_says_nothing_verifies_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    assert "manifest.json" in str(problem_with(tmp_path))


def test_status_says_who_runs_and_how_it_ended(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, source=until(7, die))
    ended = status(tmp_path)
    assert (ended["state"], ended["code"], ended["step"], ended["steps"]) == ("failed", 130, 5, 20)
    assert ended["pid"] == os.getpid()
    with pytest.raises(Preempted):
        run(tmp_path, max_seconds=0.0)
    assert (status(tmp_path)["state"], status(tmp_path)["code"]) == ("preempted", 75)
    run(tmp_path)
    assert (status(tmp_path)["state"], status(tmp_path)["code"], status(tmp_path)["step"]) == ("finished", 0, 20)


class _Bug(ToyTask):
    def loss(self, part, step):  # type: ignore[no-untyped-def]
        if step == 8:
            raise ZeroDivisionError("always here")
        return super().loss(part, step)


def test_a_run_that_fails_in_the_same_step_life_after_life_is_not_repeated_for_ever(tmp_path: Path) -> None:
    for _ in range(failures.MAX_ATTEMPTS):
        with pytest.raises(ZeroDivisionError):
            run(tmp_path, task=_Bug())
    with pytest.raises(StuckError, match=r"5 times in step 8.*always here.*do not requeue") as caught:
        run(tmp_path, task=_Bug())
    assert caught.value.code == 80
    assert (status(tmp_path)["state"], status(tmp_path)["code"]) == ("failed", 80)
    (tmp_path / "failures.jsonl").unlink()
    run(tmp_path)
    assert status(tmp_path)["state"] == "finished"


def test_interruptions_and_failures_in_different_steps_are_no_reason_to_give_up(tmp_path: Path) -> None:
    journal = failures.FailureJournal(tmp_path / "failures.jsonl")
    for step in (3, 3, 3, 3, 4, 3, 3, 3, 3):
        journal.add(step, "killed")
    (tmp_path / "failures.jsonl").open("a").write('{"step": 3, "cau')
    journal.check()
    for _ in range(2 * failures.MAX_ATTEMPTS):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", source=until(7, die))
    run(tmp_path / "run")


def test_lives_too_short_for_a_step_are_not_repeated_for_ever(tmp_path: Path) -> None:
    """By as many as end in the same step; a step done in between begins the count anew."""

    def too_short() -> None:
        with pytest.raises(Preempted, match="reached --max-time; no step fitted into it"):
            run(tmp_path, max_seconds=0.0)

    for _ in range(failures.MAX_ATTEMPTS - 1):
        too_short()
    with pytest.raises(Preempted, match="stopped at step 9 of 20: received SIGTERM; checkpoint saved"):
        run(tmp_path, source=until(8, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    for _ in range(failures.MAX_ATTEMPTS):
        too_short()
    with pytest.raises(StuckError, match=r"5 times in step 10: the last time: .*--max-time.*do not requeue"):
        run(tmp_path, max_seconds=0.0)
    (tmp_path / "failures.jsonl").unlink()
    run(tmp_path)
    assert status(tmp_path)["state"] == "finished"


def test_a_lock_tells_in_which_step_its_owner_died(tmp_path: Path) -> None:
    first = run_lock.RunLock(tmp_path / ".lock")
    assert first.acquire(print) is None
    first.note(1234)
    assert (tmp_path / ".lock").read_text().endswith(", in step 1234\n")
    first.note(None)
    assert (tmp_path / ".lock").read_text() == f"pid {os.getpid()} on {os.uname().nodename}\n"
    first.note(7)
    first.release()
    assert run_lock.RunLock(tmp_path / ".lock").acquire(print) == 7


def test_without_file_locks_a_live_owner_is_still_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "lockf", unsupported)
    lock = tmp_path / ".lock"
    lock.write_text(f"pid {os.getppid()} on {os.uname().nodename}\n")
    with pytest.raises(OutputError, match=f"pid {os.getppid()} on"):
        RunFolder(tmp_path, SilentReporter()).__enter__()
    lock.write_text(f"pid 999999999 on {os.uname().nodename}\n")
    reporter = SilentReporter()
    with RunFolder(tmp_path, reporter):
        assert "without locks" in reporter.messages[0]


def test_room_is_asked_for_what_will_be_there_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(2.5 * 2**20)))
    run(tmp_path / "two", configured(steps=10))  # two checkpoints, a little over a MiB each at most
    with pytest.raises(Exception, match="no room for 3 checkpoints"):
        run(tmp_path / "three", configured(steps=15))


def test_signals_that_were_held_back_are_answered_before_the_first_step() -> None:
    code = """
import os, signal
from ldm_cli.errors import Preempted
from ldm_cli.training.interruption import StopRequest, hold_signals
hold_signals()
os.kill(os.getpid(), signal.SIGTERM)
with StopRequest() as stop:
    try:
        with stop.answered_at_once():
            raise SystemExit("not reached")
    except Preempted as error:
        print(error.code, error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == (
        "75 stopped before the first step: received SIGTERM; run the same command again to go on [E-PREEMPTED]\n"
    )


@pytest.mark.parametrize(("apart", "code"), [(0.0, 75), (0.3, 143)])
def test_the_second_signal_is_fatal_in_the_middle_of_a_long_call_but_not_a_doubled_one(apart: float, code: int) -> None:
    """The key derivation keeps the main thread from every bytecode, as a long kernel or write does."""
    script = f"""
import hashlib, os, signal, sys, threading, time
from ldm_cli.training.interruption import StopRequest
def send():
    for pause in (0.2, {apart}):
        time.sleep(pause)
        os.kill(os.getpid(), signal.SIGTERM)
with StopRequest() as stop:
    threading.Thread(target=send).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 3_000_000)
    sys.exit(75 if stop.reason else 1)
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, timeout=60).returncode == code


def test_a_signal_where_nothing_is_to_save_ends_it_where_it_arrives() -> None:
    def prepare(stop: StopRequest) -> None:
        with stop.answered_at_once():
            os.kill(os.getpid(), signal.SIGUSR1)
            raise AssertionError("not reached")

    with StopRequest() as stop, pytest.raises(Preempted, match="received SIGUSR1"):
        prepare(stop)


def test_json_of_a_checkpoint_names_the_versions(tmp_path: Path) -> None:
    run(tmp_path, configured(steps=1))
    manifest = json.loads((tmp_path / "checkpoints/step-00000001/manifest.json").read_text())
    assert manifest["versions"].keys() == {"ldm", "torch", "python"}
    assert manifest["files"].keys() >= {"model/model.safetensors", "training.safetensors", "state.json"}
