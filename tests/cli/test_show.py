"""Results: tables that fit, JSON that parses."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ldm_cli.cli import app
from ldm_cli.cli.show import show_result


def test_tables_hold_every_value_in_full_when_piped(capfd: pytest.CaptureFixture[str]) -> None:
    path = "runs/" + "x" * 300
    show_result(
        {
            "run": path,
            "step": 12345,
            "figures": {"val_loss": 0.123456, "ok": True, "none": None},
            "tasks": {"color": {"accuracy": 0.5, "n": 10}, "shape": {"accuracy": 0.25, "n": 10}},
            "images": [{"file": "a.png", "seed": 0}, {"file": "[bold]b.png", "seed": 1}],
            "prompts": ["a", "b"],
        },
        as_json=False,
    )
    out = capfd.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert ["run", path] in lines
    assert ["step", "12,345"] in lines
    assert ["prompts", "a,", "b"] in lines
    assert ["val", "loss", "0.1235"] in lines
    assert ["ok", "yes"] in lines
    assert ["color", "0.5", "10"] in lines
    assert ["[bold]b.png", "1"] in lines
    assert "\x1b" not in out


def test_json_has_null_for_what_json_cannot_say(capfd: pytest.CaptureFixture[str]) -> None:
    show_result({"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": (1, 2)}, "e": "é"}, as_json=True)
    assert json.loads(capfd.readouterr().out) == {"a": None, "b": [None, 1.5], "c": {"d": [1, 2]}, "e": "é"}


def test_untrusted_text_cannot_steer_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    show_result({"t\x1b[2J": [{"caption": "a\x1b]0;x\x07b\u202e"}]}, as_json=False)
    out = capfd.readouterr().out
    assert "\x1b" not in out
    assert "\\x1b]0;x\\x07b\\u202e" in out


def test_numbers_in_a_list_have_as_many_digits_as_others(capfd: pytest.CaptureFixture[str]) -> None:
    show_result({"interval": [1.234567, 22.0], "sizes": [1024, 7]}, as_json=False)
    assert [line.split(maxsplit=1)[1] for line in capfd.readouterr().out.splitlines()] == ["1.235, 22", "1024, 7"]


@pytest.fixture
def on_screen(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[str]]:
    """The lines, without colours, that a result has on a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")

    def lines(result: Any) -> list[str]:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        show_result(result, as_json=False)
        return re.sub(r"\x1b\[[\d;]*m", "", capfd.readouterr().out).splitlines()

    return lines


LONG = f"/home/somebody/my pictures/{'x' * 70}/model"


def test_a_path_longer_than_the_screen_is_never_broken(on_screen: Callable[[Any], list[str]]) -> None:
    images = [{"file": f"{LONG}/a.png", "seed": 0, "prompt": "a red circle"}]
    lines = on_screen({"run": LONG, "about": "a b", "files": [LONG, "b/c"], "images": images, LONG: [{"a": 1}]})
    assert lines[:4] == [f" run     {LONG}", " about   a b", f" files   {LONG}", "         b/c"]
    assert f" {LONG}/a.png      0   a red circle" in lines
    assert LONG in lines
    header = f" file{' ' * (len(LONG) + 5)}seed   prompt"
    assert [line for line in lines if len(line) > 80 and LONG not in line] == [header]


def test_prose_beside_a_path_is_wrapped_between_words(on_screen: Callable[[Any], list[str]]) -> None:
    file = f"runs/{'x' * 40}/a.png"
    lines = on_screen({"images": [{"file": file, "prompt": "a red circle " * 9, "seed": 7}]})
    assert max(map(len, lines)) <= 80
    assert lines[3].split() == [file, "a", "red", "circle", "a", "7"]
    assert set(" ".join(lines[4:]).split()) == {"a", "red", "circle"}


def test_a_dry_run_counts_no_memory_of_models_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert app.run(["sample", "--model", "nowhere", "-p", "a", "--dry-run"]) == 0
    out = capfd.readouterr().out
    assert "note: model: model 'nowhere' not found" in out
    assert "memory" not in out


def test_a_column_that_says_nothing_is_left_out(capfd: pytest.CaptureFixture[str]) -> None:
    show_result({"bad": [{"key": "a", "step": None, "place": ""}, {"key": "b", "step": None, "place": "x"}]}, False)
    header, _, first, second = (line.split() for line in capfd.readouterr().out.splitlines()[1:])
    assert (header, first, second) == (["key", "place"], ["a"], ["b", "x"])
