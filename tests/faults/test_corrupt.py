"""A sample of the fuzzer, and that it can fail."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from .corrupt import CASES, DAMAGES, Case, Stage, corrupted_files, trial
from .lives import Home
from .matrix import Bench

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("corrupt")
    (folder / "home").mkdir()
    return Bench(Home(folder / "home"), random.Random(5), folder / "work", trials=3)


def test_a_few_damages_are_noticed_or_mended(bench: Bench) -> None:
    corrupted_files(bench, CASES[:3])
    assert bench.tally.problems == []
    assert bench.tally.trials == 3


def test_every_damage_changes_the_file_and_a_silent_change_is_counted(bench: Bench, tmp_path: Path) -> None:
    stage = tmp_path / "stage"
    for damage in DAMAGES:
        stage.mkdir(exist_ok=True)
        for name in ("a.json", "b.json"):
            (stage / name).write_text(f'{{"name": "{name}", "number": 12345678}}')
        before = (stage / "a.json").read_bytes()
        for number in range(9):
            damage(stage / "a.json", random.Random(number), 0.5)
            if not (stage / "a.json").is_file() or (stage / "a.json").read_bytes() != before:
                break
        else:
            pytest.fail(f"{damage.__name__} changes nothing")
        (stage / "a.json").unlink() if not (stage / "a.json").is_dir() else (stage / "a.json").rmdir()
    case = Case("check", ("data", "check", "{stage}/scenes/train-*.tar"), ("scenes/scenes.json",), (), lambda _: 0)
    ours = Bench(bench.home, random.Random(0), tmp_path, trials=1)
    staged = Stage.__new__(Stage)
    staged.path, staged.whole = bench.folder / "stage", bench.folder / "whole"
    assert trial(ours, staged, case, (1, 0, 300.0))[1] == "silent"
    assert len(ours.tally.silent) == 1
