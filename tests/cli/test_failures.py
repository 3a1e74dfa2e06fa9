"""Every failure is the documented exit code and one line, the last on stderr."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ldm_cli.cli import app, failures, report
from ldm_cli.cli.report import PlainReporter
from ldm_cli.errors import DataError, LdmError
from tests.conftest import REPOSITORY, Ldm
from tests.faults.lives import Life


def last_line(stderr: str) -> str:
    return stderr.splitlines()[-1]


def test_a_typo_in_a_recipe_is_one_line_with_its_place_the_right_key_and_78(ldm: Ldm, tmp_path: Path) -> None:
    text = (REPOSITORY / "recipes/demo/vae.yaml").read_text(encoding="utf-8")
    (tmp_path / "vae.yaml").write_text(text.replace("  steps:", "  stpes:"), encoding="utf-8")
    result = ldm("train-vae", "vae.yaml")
    line = text[: text.index("  steps:")].count("\n") + 1
    assert result.stderr == (
        f"ldm: error: vae.yaml:{line}:3: train.stpes: unknown key (did you mean 'steps'?) [E-RECIPE]\n"
    )
    assert (result.returncode, result.stdout) == (78, "")
    assert [path.name for path in tmp_path.iterdir()] == ["vae.yaml"]


def test_several_problems_are_a_line_each_and_a_line_for_all(ldm: Ldm, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("command: train-vae\nname: 3\nvae: {}\ntrain: {steps: 1, batch_size: 1}\n")
    result = ldm("train-vae", "r.yaml", "train.lr=fast")
    assert result.returncode == 78
    assert result.stderr.splitlines() == [
        "r.yaml:1:1: missing required key 'data'",
        "r.yaml:2:7: name: expected text, found integer 3 (put it in quotes)",
        "override 'train.lr=fast': train.lr: expected a number, found text 'fast'",
        "ldm: error: recipe 'r.yaml' is invalid: 3 problems [E-RECIPE]",
    ]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "no command given; see ldm --help"),
        (["trian-clip"], "no such command 'trian-clip'"),
        (["generate"], "no such command 'generate'; write ldm sample, or see ldm --help"),
        (["train-lora", "x"], "no such command 'train-lora'; write ldm train-unet, or see ldm --help"),
        (["train-clip"], "missing argument 'RECIPE'; see ldm train-clip --help"),
        (["train-clip", "demo/clip", "--ouy", "x"], "no such option: --ouy"),
        (["train-clip", "demo/clip", "--out"], "option '--out' requires an argument"),
        (["train-clip", "demo/clip", "lr"], "unexpected argument 'lr': it is not KEY=VALUE"),
        (["train-clip", "demo/clip", "--max-time", "soon"], "--max-time 'soon' is no duration"),
        (["sample", "--model", "m", "-p", "x", "--steps", "many"], "invalid value for '--steps'"),
        (["sample", "--model", "m", "-p", "x", "--size", "big"], "--size 'big' is no size"),
        (
            ["sample", "--model", "m", "-p", "x", "--steps", "0"],
            "option '--steps': sampling.steps: expected at least 1",
        ),
        (["sample", "--model", "m"], "no prompt given"),
        (["sample", "-p", "x"], "no model given"),
        (["data"], "missing command; see ldm data --help"),
        (["data", "synth", "x", "--samples", "0"], "invalid value for '--samples'"),
        (["recipe", "schema", "train-clop"], "no recipe is for the command 'train-clop'"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_2(
    arguments: list[str], line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert app.run(arguments) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ldm: error: ")
    assert captured.err.endswith(" [E-USAGE]\n")
    assert captured.err.count("\n") == 1
    assert line in captured.err


def test_a_recipe_that_is_not_there_is_66_and_suggested(capfd: pytest.CaptureFixture[str]) -> None:
    assert app.run(["train-clip", "demo/clop"]) == 66
    assert "(did you mean 'demo/clip'?)" in last_line(capfd.readouterr().err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is not missing here")
def test_a_missing_device_is_69(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["train-vae", "demo/vae", "--device", "cuda", "--out", str(tmp_path / "out")]
    assert app.run(arguments) == 69
    assert "device 'cuda' is missing" in last_line(capfd.readouterr().err)
    assert list(tmp_path.iterdir()) == []


LDM_ERRORS = [error for error in LdmError.__subclasses__() if not error.__subclasses__()]


def system_error(number: int, *filename: str) -> OSError:
    return OSError(number, os.strerror(number), *filename)


RAISED: list[tuple[BaseException, int, str]] = [
    *((error("what", "cause", "remedy"), error.code, f"what: cause; remedy [{error.tag}]") for error in LDM_ERRORS),
    (KeyboardInterrupt(), 130, "interrupted"),
    (MemoryError(), 81, "out of memory"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried 3 GiB\nmore"), 81, "CUDA out of memory. Tried"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 81, "can't allocate"),
    (system_error(errno.ENOENT, "a.tar"), 66, "cannot open 'a.tar': no such file"),
    (system_error(errno.EACCES, "out"), 73, "cannot open 'out': permission denied"),
    (system_error(errno.ENOSPC, "a.png"), 74, "cannot read or write 'a.png': no space left"),
    (system_error(errno.EIO), 74, "cannot read or write: input/output error"),
    (ZeroDivisionError("by zero\nsecond line"), 70, "unexpected ZeroDivisionError: by zero; this is a bug"),
]


@pytest.mark.parametrize(("error", "code", "line"), RAISED)
def test_what_a_stage_raises_becomes_its_code_and_one_line(
    error: BaseException,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    raise_in(monkeypatch, error)
    assert app.run(["recipe", "list"]) == code
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ldm: error: ")
    assert captured.err.count("\n") == 1
    assert line in captured.err


def raise_in(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let `ldm recipe list` fail with `error`."""

    def fail() -> None:
        raise error

    monkeypatch.setattr("ldm_cli.recipe.shipped.shipped_recipes", fail)


def test_a_bug_leaves_a_report_without_the_environment(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    raise_in(monkeypatch, ZeroDivisionError("division by zero"))
    app.run(["recipe", "list"])
    (path,) = tmp_path.iterdir()
    assert f"'{path}'" in capfd.readouterr().err
    text = path.read_text(encoding="utf-8")
    assert "ZeroDivisionError: division by zero" in text
    assert "in fail" in text
    assert "['recipe', 'list']" in text
    assert "hf_secret" not in text


def test_debug_shows_the_traceback_before_the_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    raise_in(monkeypatch, DataError("broken"))
    assert app.run(["recipe", "list", "--debug"]) == 65
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "ldm: error: broken [E-DATA]"


def test_control_characters_in_an_error_are_escaped(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    raise_in(monkeypatch, DataError("bad key 'a\x1b[2J\u202eb\nc'"))
    app.run(["recipe", "list"])
    assert capfd.readouterr().err == "ldm: error: bad key 'a\\x1b[2J\\u202eb\\nc' [E-DATA]\n"


def test_every_error_class_keeps_its_documented_code() -> None:
    documented = {2, 65, 66, 69, 70, 73, 74, 75, 78, 80, 81, 82, 83}
    assert {error.code for error in [LdmError, *LdmError.__subclasses__()]} == documented


def _started(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ldm_cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    # A shell that runs the tests in the background has SIGINT ignored, and Python would leave it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)


def _assert_stopped(folder: Path, code: int | None, said: str, number: signal.Signals) -> None:
    assert code == 75
    assert re.search(
        rf"error: stopped at \d{{4}} of 110000 \w+s: received {number.name}; run the same command again to go on "
        r"\[E-PREEMPTED\]",
        last_line(said),
    )
    assert not list((folder / "scenes").glob(".tmp-*"))
    assert "Traceback" not in said


def _has_written(folder: Path) -> bool:
    """Whether the third of two shards at a time is there: the first ones have been counted."""
    return (folder / "scenes/train-000002.tar").exists()


def test_a_stopped_command_counts_and_the_same_one_goes_on(tmp_path: Path) -> None:
    with _started(tmp_path, "data", "synth", "scenes", "--samples", "100000") as process:
        deadline = time.monotonic() + 60
        while not _has_written(tmp_path) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    _assert_stopped(tmp_path, process.returncode, stderr, signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.exhaustive)])
def test_any_signal_to_stop_stops_a_command(number: signal.Signals, tmp_path: Path) -> None:
    life = Life(["data", "synth", str(tmp_path / "scenes"), "--samples", "100000"], tmp_path / "log")
    while not _has_written(tmp_path):
        assert life.lasts(0.02), life.errors
    life.send(number, group=False)
    life.end()
    _assert_stopped(tmp_path, life.code, life.errors, number)


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["sample", "demo/sample"], "run the same command again to go on"),
        (["eval", "demo/eval", "--out", "x"], "run the same command again to go on"),
        (["eval", "demo/eval"], "nothing is kept: the same command starts again, and with --out DIR it would go on"),
        (["data", "pack", "a", "b"], "nothing is kept: the same command starts again"),
    ],
)
def test_a_stopped_command_says_what_is_kept(
    arguments: list[str], remedy: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def pack() -> None:
        with PlainReporter().progress("packing", 12, unit="image") as progress:
            progress.update(5)
            raise KeyboardInterrupt

    monkeypatch.setattr(report, "_running", [])
    with pytest.raises(KeyboardInterrupt):
        pack()
    assert failures.report(KeyboardInterrupt(), arguments, debug=False, stopped_by=signal.SIGTERM) == 75
    line = f"ldm: error: stopped at 5 of 12 images: received SIGTERM; {remedy} [E-PREEMPTED]"
    assert last_line(capfd.readouterr().err) == line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_command_at_once_and_an_echo_of_the_first_does_not(number: signal.Signals) -> None:
    program = f"""
import signal, time
from ldm_cli.training.interruption import InterruptNote
signal.signal(signal.SIGINT, signal.default_int_handler)
with InterruptNote():
    try:
        signal.raise_signal({int(number)})
    except KeyboardInterrupt:
        signal.raise_signal({int(number)})
        print("still here", flush=True)
        time.sleep(0.2)
        signal.raise_signal({int(number)})
        print("too long", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (128 + number, "still here\n")


def test_control_c_of_which_a_library_makes_another_error_is_130_too(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise ValueError("could not determine the shape")

    monkeypatch.setattr("ldm_cli.recipe.shipped.shipped_recipes", fail)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert app.run(["recipe", "list"]) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert capfd.readouterr().err == "ldm: error: interrupted: received SIGINT [E-INTERRUPTED]\n"


def test_an_exit_that_is_no_failure_says_nothing() -> None:
    assert failures.exit_code_of(BrokenPipeError()) == 141
    assert failures.exit_code_of(SystemExit(1)) == 141
    assert failures.exit_code_of(ValueError()) is None
