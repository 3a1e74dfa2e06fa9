"""Results on stdout, all else on stderr, whatever the two are connected to."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ldm_cli.cli import app
from ldm_cli.recipe.yaml_source import parse_yaml
from tests.conftest import REPOSITORY, Ldm

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


def test_the_reader_of_stdout_may_leave(tmp_path: Path) -> None:
    script = f"{sys.executable} -m ldm_cli recipe schema 2>stderr | true; echo ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.stdout == "141\n"
    assert (tmp_path / "stderr").read_text() == ""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["recipe", "list"]])
def test_a_full_disk_behind_stdout_is_74(ldm: Ldm, arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        result = ldm(*arguments, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert result.returncode == 74
    assert result.stderr == "ldm: error: cannot read or write: no space left on device [E-IO]\n"


@pytest.mark.parametrize("arguments", [["--help"], ["recipe", "list"], ["sample", "--help"]])
def test_an_ascii_terminal_gets_ascii(ldm: Ldm, arguments: list[str]) -> None:
    result = ldm(*arguments, env=ASCII, encoding="ascii")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout


@pytest.mark.slow
def test_any_text_can_be_printed_to_an_ascii_terminal(ldm: Ldm, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("command: sample\nmodel: m\nprompts: [猫 é, \U0001f600]\n", encoding="utf-8")
    shown = ldm("recipe", "show", "r.yaml", env=ASCII, encoding="ascii")
    assert (shown.returncode, shown.stderr) == (0, "")
    as_json = ldm("recipe", "show", "r.yaml", "--json", env=ASCII, encoding="ascii")
    as_yaml = ldm("recipe", "show", "r.yaml", "--resolved", env=ASCII, encoding="ascii")
    prompts = ["猫 é", "\U0001f600"]
    assert json.loads(as_json.stdout)["prompts"] == parse_yaml(as_yaml.stdout).data["prompts"] == prompts


def test_json_is_one_object_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert app.run(["data", "synth", "scenes", "--samples", "10", "--val-samples", "2", "--json"]) == 0
    made = capfd.readouterr()
    assert json.loads(made.out)["samples"] == 10
    assert app.run(["train-vae", "demo/vae", "data.shards=scenes/train-*.tar", "--dry-run", "--json"]) == 0
    planned = capfd.readouterr()
    assert json.loads(planned.out)["shards"] == {"num_shards": 1, "num_samples": 10}
    assert json.loads(planned.out)["recipe"]["data"]["shards"] == "scenes/train-*.tar"
    assert "\x1b" not in made.err + planned.err
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]


def test_streams_that_were_closed_are_not_given_to_files(tmp_path: Path) -> None:
    script = f"{sys.executable} -m ldm_cli data synth scenes --samples 3 --val-samples 1 <&- >&- 2>&-"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    assert subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment).returncode == 0
    record = json.loads((tmp_path / "scenes" / "scenes.json").read_text())
    assert record["complete"] is True


def test_damaged_data_is_shown_and_65(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert app.run(["data", "synth", str(tmp_path), "--samples", "4", "--val-samples", "1"]) == 0
    shard = tmp_path / "train-000000.tar"
    assert app.run(["data", "check", str(shard), "data.missing_caption=skip"]) == 0, "fields are named as in messages"
    shard.write_bytes(shard.read_bytes()[:-12000])
    capfd.readouterr()
    assert app.run(["data", "check", str(shard), "--json"]) == 65
    captured = capfd.readouterr()
    assert list(json.loads(captured.out)["damaged_shards"]) == [str(shard)]
    assert captured.err.splitlines()[-1].startswith("ldm: error: the data is not sound: ")


def on_terminal(*arguments: str, folder: Path, **variables: str) -> tuple[int, str]:
    """Exit code and screen of the program on a terminal of 80 columns."""
    main, side = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TERM": "xterm", "COLUMNS": "80", **variables}
    command = [sys.executable, "-m", "ldm_cli", *arguments]
    process = subprocess.Popen(command, stdin=side, stdout=side, stderr=side, cwd=folder, env=environment)
    os.close(side)
    screen = b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            piece = os.read(main, 65536)
        except OSError:  # how Linux says that the other side is closed
            break
        if not piece:
            break
        screen += piece
    os.close(main)
    return process.wait(timeout=10), screen.decode()


def test_a_terminal_gets_colour_bars_and_tables_as_wide_as_itself(tmp_path: Path) -> None:
    code, screen = on_terminal("data", "synth", "scenes", "--samples", "300", folder=tmp_path, NO_COLOR="")
    assert code == 0
    assert "\x1b[" in screen
    assert "writing scenes" in screen
    assert "scene/s" in screen


def test_no_color_is_respected_on_a_terminal(tmp_path: Path) -> None:
    code, screen = on_terminal("recipe", "list", folder=tmp_path, NO_COLOR="1")
    assert code == 0
    assert "demo/clip" in screen
    assert "\x1b[3" not in screen  # no colour: bold and cursor movements may be there


def test_a_dumb_terminal_gets_plain_lines(tmp_path: Path) -> None:
    code, screen = on_terminal("data", "synth", "scenes", "--samples", "30", folder=tmp_path, TERM="dumb")
    assert code == 0
    assert "\x1b" not in screen
