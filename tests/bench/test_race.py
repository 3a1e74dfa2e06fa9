"""Contenders in processes of their own: how they take turns, what is measured there, and what comes back."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_cli.bench.race import Contender, Lap, Turns, race, speed, speed_and_memory
from ldm_cli.errors import DataError, UnavailableError, WorkerError

_MIB = 2**20


def idle(turns: Turns) -> None:
    turns.repeat(1, lambda: None)


def noting(turns: Turns, file: Path, name: str) -> None:
    def note() -> None:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(name)

    turns.repeat(3, note)


def sleeping(turns: Turns) -> None:
    """The first turn takes a second, later ones a twentieth."""
    time.sleep(1.0)
    turns.repeat(2, lambda: time.sleep(0.05))


def failing(_: Turns, error: Exception) -> None:
    raise error


def dying(_: Turns) -> None:
    os._exit(9)


def short(turns: Turns) -> None:
    turns.done(1)


def where(turns: Turns, file: Path) -> None:
    facts = f"{os.sched_getaffinity(0)} {torch.get_num_threads()}"
    turns.repeat(1, lambda: file.write_text(facts, encoding="utf-8"))


def test_a_speedup_is_the_median_of_ratios_in_one_round() -> None:
    theirs, ours = [[Lap(1, s, 0.0, 1) for s in seconds] for seconds in ((2.0, 6.0, 1.5), (1.0, 2.0, 1.0))]
    assert speed("", theirs, ours) == {"contender": "", "per_second": 1 / 2.0, "speedup": 2.0}


def test_memory_is_the_last_peak_and_processor_time_that_of_a_unit() -> None:
    ours, theirs = [Lap(4, 1.0, 2.0, 1 * _MIB), Lap(4, 1.0, 2.0, 2 * _MIB)], [Lap(2, 1.0, 1.0, 4 * _MIB)] * 2
    rows = speed_and_memory({"ldm": ours, "peer": theirs})
    assert [(row["peak_mib"], row["memory_ratio"], row["cpu_ms_per_unit"]) for row in rows] == [
        (2, 1, 500),
        (4, 0.5, 500),
    ]


@pytest.mark.usefixtures("forked")
def test_contenders_take_turns_after_a_first_one_each(tmp_path: Path) -> None:
    laps = race([Contender(name, noting, (tmp_path / "notes", name)) for name in "ab"], rounds=3)
    assert (tmp_path / "notes").read_text() == "ab" + "ab" * 3
    assert {name: [lap.units for lap in each] for name, each in laps.items()} == {"a": [3, 3, 3], "b": [3, 3, 3]}


@pytest.mark.usefixtures("forked")
def test_neither_the_first_turn_nor_the_wait_for_others_is_timed() -> None:
    laps = race([Contender(name, sleeping) for name in "abc"], rounds=2)
    for name in "abc":
        assert all(0.05 <= lap.seconds < 0.9 for lap in laps[name])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only /proc reports a program's own peak")
def test_a_contender_does_not_begin_at_the_peak_of_this_process() -> None:
    large = bytearray(900 * _MIB)
    large[:: 1 << 12] = b"x" * len(large[:: 1 << 12])  # every page is taken
    (laps,) = race([Contender("idle", idle)], rounds=1).values()
    assert 50 * _MIB < laps[-1].peak_bytes < len(large)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system does not bind processes")
@pytest.mark.usefixtures("forked")
def test_contenders_of_one_thread_run_on_the_same_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    files = [tmp_path / name for name in "abc"]
    race([Contender(str(file), where, (file,)) for file in files[:2]], rounds=1, one_processor=True)
    race([Contender("free", where, (files[2],))], rounds=1)
    processors = os.sched_getaffinity(0)
    assert [file.read_text() for file in files] == [f"{ {min(processors)} } 1"] * 2 + [f"{processors} 2"]


@pytest.mark.usefixtures("forked")
def test_an_error_for_the_user_arrives_whole() -> None:
    error = DataError("no sample can be used", "all are bad", "look at them")
    with pytest.raises(DataError) as caught:
        race([Contender("a", failing, (error,))], rounds=1)
    assert (caught.value.what, caught.value.cause, caught.value.remedy) == (error.what, error.cause, error.remedy)


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    ("run", "arguments", "kind", "message"),
    [
        (failing, (ImportError("no such model"),), UnavailableError, "'b' cannot do this work: ImportError: no such"),
        (dying, (), WorkerError, "benchmark process 'b' died"),
        (short, (), WorkerError, "'b' has no more work"),
    ],
)
def test_any_other_end_names_the_contender(run: Any, arguments: tuple[Any, ...], kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        race([Contender("a", idle), Contender("b", run, arguments)], rounds=1)
