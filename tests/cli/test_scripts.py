"""The scripts that a person runs beside the tool, with a stand-in for `ldm`."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

SCRIPT = REPOSITORY / "scripts/until_done.sh"


def _started(folder: Path, body: str) -> subprocess.Popen[str]:
    """The script with an `ldm` that runs `body`, after it has noted its arguments in `calls`."""
    program = folder / "bin/ldm"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> calls\n{body}\n')
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"}
    command = [str(SCRIPT), "train-vae", "demo/vae", "train.steps=3"]
    return subprocess.Popen(command, cwd=folder, env=environment, text=True)


@pytest.mark.parametrize("code", [0, 73, 80])
def test_the_loop_repeats_on_75_and_ends_with_any_other_code(tmp_path: Path, code: int) -> None:
    with _started(tmp_path, f"[ $(wc -l < calls) -lt 3 ] && exit 75; exit {code}") as process:
        assert process.wait(30) == code
    assert (tmp_path / "calls").read_text() == "train-vae demo/vae train.steps=3\n" * 3


def test_a_signal_to_the_loop_stops_the_command_and_then_the_loop(tmp_path: Path) -> None:
    body = "trap 'sleep 0.3; echo saved >> calls; exit 75' TERM; touch ready; while :; do sleep 0.05; done"
    with _started(tmp_path, body) as process:
        while not (tmp_path / "ready").exists():
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 75
    assert (tmp_path / "calls").read_text() == "train-vae demo/vae train.steps=3\nsaved\n"
