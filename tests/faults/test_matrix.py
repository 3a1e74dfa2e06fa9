"""A fast sample of `make faults`, and that the matrix can fail."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ..conftest import REPOSITORY
from .matrix import Tally, different, rows

pytestmark = pytest.mark.slow

# Kills and signals are tested beside this, in test_kill.py.
QUICK = ["file-size-limit", "damaged-checkpoint", "other-owner", "secrets"]


def matrix(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.faults.matrix", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)


@pytest.mark.exhaustive
def test_a_sample_of_every_kind_of_fault_is_survived(tmp_path: Path) -> None:
    quick = [*QUICK, "io-error-at-system-call"] if shutil.which("strace") else QUICK
    result = matrix("--trials", "1", "--seed", "7", "--only", *quick, "--keep", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == "all as it must be"


def test_every_row_has_a_name_and_trials_of_its_own() -> None:
    table = rows()
    assert len(table) > 20
    assert all(row.__doc__ or row.func.__doc__ for row, _ in table.values())  # type: ignore[attr-defined]


def test_a_difference_of_one_bit_is_seen(tmp_path: Path) -> None:
    for name in ("one", "two"):
        folder = tmp_path / name / "checkpoints/step-00000001"
        folder.mkdir(parents=True)
        (tmp_path / name / "model").mkdir()
        save_file({"x": torch.zeros(2)}, folder / "training.safetensors", {"a": "1", "b": "2"})
        save_file({"x": torch.zeros(2)}, tmp_path / name / "model/model.safetensors")
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert different(tmp_path / "one", tmp_path / "two") is None
    moments = tmp_path / "two/checkpoints/step-00000001/training.safetensors"
    save_file({"x": torch.tensor([0.0, 1e-45])}, moments, {"a": "1", "b": "2"})
    assert different(tmp_path / "one", tmp_path / "two") == "checkpoints/step-00000001/training.safetensors differs"
    moments.write_bytes(moments.read_bytes()[:20])
    assert different(tmp_path / "one", tmp_path / "two") == "checkpoints/step-00000001/training.safetensors differs"
    shutil.copyfile(tmp_path / "one" / moments.relative_to(tmp_path / "two"), moments)
    (tmp_path / "two/.tmp-model").mkdir()
    assert different(tmp_path / "one", tmp_path / "two") == "left behind: ['.tmp-model']"


def test_wrong_words_and_wrong_codes_are_counted() -> None:
    tally = Tally()
    tally.judge_words(75, "ldm: error: stopped [E-PREEMPTED]\n", {75}, "fine")
    assert tally.problems == []
    tally.judge_words(0, "", {75}, "a wrong code")
    tally.judge_words(74, "Traceback (most recent call last):\nOSError\n", {74}, "a traceback without a line")
    assert (len(tally.codes), len(tally.tracebacks)) == (2, 1)
