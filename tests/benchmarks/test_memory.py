"""The study of memory: what it reads, and what it computes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from benchmarks import memory

_MIB = 2**20


class ThisProcess:
    """Stands in for a pool of processes."""

    def __init__(self, *_: object) -> None:
        pass

    def __enter__(self) -> ThisProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*arguments))
        return future


def test_the_memory_of_real_runs_is_read_as_they_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "ProcessPoolExecutor", ThisProcess)
    rows = memory.memory(4, "cpu")
    assert [row["work"] for row in rows if row["memory"] == "resident"] == ["demo/clip", "demo/vae", "demo/unet"]
    for row in rows:
        assert (row["memory"] in ("resident", "allocated"), row["steps"], len(row["mib"])) == (True, 4, 2)
        assert min(row["mib"]) > 1


def test_memory_is_flat_unless_it_goes_on_growing() -> None:
    begin = [(step, step * _MIB) for step in range(0, 201, 10)]
    level = begin + [(step, 300 * _MIB + step % 20 * 100) for step in range(210, 2001, 10)]
    leak = begin + [(step, 300 * _MIB + max(0, 1000 - step) * 8000 + step * 4000) for step in range(210, 2001, 10)]
    found = memory.trend(level)
    assert (found["flat"], found["steps"]) == (True, 2000)
    assert found["mib"][0] == pytest.approx(300, abs=0.1)
    assert len(found["mib"]) == 10
    filling = begin + [(step, min(step, 1000) * _MIB) for step in range(210, 2001, 10)]
    found = memory.trend(filling)
    assert found["mib_per_1000_steps"] > 100
    assert (found["in_second_half"], found["flat"]) == (pytest.approx(0), True)
    found = memory.trend(leak)
    assert not found["flat"]
    assert found["in_second_half"] == pytest.approx(4e6 / _MIB)
    assert found["mib"][-1] == pytest.approx(300 + 8e6 / _MIB, abs=0.06)
    assert found["mib_per_1000_steps"] < found["in_second_half"]
    page = begin + [(step, (300 + 2 * (step > 1500)) * _MIB) for step in range(210, 2001, 10)]
    assert memory.trend(page)["in_second_half"] > 1
    assert memory.trend(page)["flat"]
    two_pages = [(step, size + 2 * _MIB * (step > 1200)) for step, size in page]
    assert not memory.trend(two_pages)["flat"]
    assert not memory.trend([(step, size + 50 * _MIB * (step > 1500)) for step, size in level])["flat"]
    assert not memory.trend([(step, step * 2000) for step in range(1, 2000)])["flat"]
    assert not memory.trend([(step, step * _MIB) for step in range(1, 9)])["flat"]


def test_a_slope_takes_four_steps() -> None:
    with pytest.raises(ValueError, match="3 steps are too few for a slope"):
        memory.memory(3, "cpu")


def test_allocated_memory_is_what_is_held() -> None:
    before = memory.allocated_bytes()
    if before is None:
        pytest.skip("this malloc reports nothing")
    held = torch.ones(64 * _MIB, dtype=torch.uint8)
    assert (memory.allocated_bytes() or 0) - before == pytest.approx(len(held), rel=0.1)
    del held
    assert (memory.allocated_bytes() or 0) - before == pytest.approx(0, abs=_MIB)
