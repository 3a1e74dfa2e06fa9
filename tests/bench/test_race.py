"""Contenders in processes of their own: what is measured there, and what comes back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_cli.bench.race import Contender, Lap, Runner, race, speed
from ldm_cli.errors import DataError, UnavailableError, WorkerError

_MIB = 2**20


def idle() -> Runner:
    return Runner(lambda: None, 1)


def failing(error: Exception) -> Runner:
    raise error


def dying() -> Runner:
    os._exit(9)


def here() -> Runner:
    return Runner(lambda: None, 1, where)


def where() -> dict[str, Any]:
    return {"processors": os.sched_getaffinity(0), "threads": torch.get_num_threads()}


def test_a_speedup_is_the_median_of_ratios_in_one_round() -> None:
    assert speed("", Lap(seconds=[2.0, 6.0, 1.5]), Lap(seconds=[1.0, 2.0, 1.0]))["speedup"] == 2.0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only /proc reports a program's own peak")
def test_a_contender_does_not_begin_at_the_peak_of_this_process() -> None:
    large = bytearray(900 * _MIB)
    large[:: 1 << 12] = b"x" * len(large[:: 1 << 12])  # every page is taken
    (lap,) = race([Contender("idle", idle)], rounds=1, warmup=0).values()
    assert 50 * _MIB < lap.peak_bytes < len(large)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system does not bind processes")
def test_contenders_of_one_thread_run_on_the_same_processor() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        laps = race([Contender("a", here), Contender("b", here)], rounds=1, warmup=0, one_processor=True)
    finally:
        torch.set_num_threads(before)
    assert [laps[name].facts for name in "ab"] == [{"processors": {min(os.sched_getaffinity(0))}, "threads": 1}] * 2
    (free,) = race([Contender("a", here)], rounds=1, warmup=0).values()
    assert free.facts["processors"] == os.sched_getaffinity(0)


@pytest.mark.usefixtures("forked")
def test_an_error_for_the_user_arrives_whole() -> None:
    error = DataError("no sample can be used", "all are bad", "look at them")
    with pytest.raises(DataError) as caught:
        race([Contender("a", failing, (error,))], rounds=1)
    assert (caught.value.what, caught.value.cause, caught.value.remedy) == (error.what, error.cause, error.remedy)


@pytest.mark.usefixtures("forked")
def test_any_other_error_names_the_contender() -> None:
    with pytest.raises(UnavailableError, match="'theirs' cannot do this work: ImportError: no such model"):
        race([Contender("theirs", failing, (ImportError("no such model"),))], rounds=1)


@pytest.mark.usefixtures("forked")
def test_a_process_that_dies_is_an_error() -> None:
    with pytest.raises(WorkerError, match="benchmark process 'theirs' died"):
        race([Contender("theirs", dying)], rounds=1)
