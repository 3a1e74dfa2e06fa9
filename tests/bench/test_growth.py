"""`ldm bench growth` and `ldm bench memory`: what they vary, what they read, and what they make of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from multiprocessing import Pipe
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from ldm_cli.bench import growth, memory
from ldm_cli.bench.growth import Axis, Work
from ldm_cli.bench.race import Contender, Lap, _serve, race
from ldm_cli.errors import DataError, UsageError
from ldm_cli.reporting import SilentReporter

_MIB = 2**20


def steps_that_take_a_second_a_gflop(contenders: Sequence[Contender], **_: Any) -> dict[str, Lap]:
    """Stands in for a race: everything is built and counted, nothing is timed."""
    facts = {contender.name: contender.build(*contender.arguments).facts() for contender in contenders}
    return {name: Lap([fact["flops"] / 1e9], [2.0], facts=fact) for name, fact in facts.items()}


def runs_in_this_process(contenders: Sequence[Contender], **_: Any) -> dict[str, Lap]:
    """Stands in for a race: one step of each."""
    laps = {}
    for contender in contenders:
        runner = contender.build(*contender.arguments)
        runner.step()
        laps[contender.name] = Lap([1.5], [1.5], facts=runner.facts())
    return laps


class Idle:
    """Does nothing."""

    def step(self) -> None:
        """Rest."""

    def facts(self) -> dict[str, Any]:
        """None."""
        return {}


class Failing(Idle):
    """Cannot do the work."""

    def step(self) -> None:
        """Fail."""
        raise DataError("no sample can be used", "all are bad", "look at them")


def test_an_exponent_is_that_of_the_power_law() -> None:
    assert growth.exponent([1.0, 2.0, 4.0], [3.0, 12.0, 48.0]) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="at least 2"):
        growth.exponent([1.0], [1.0])


def test_growth_is_told_by_size_and_by_counted_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "race", steps_that_take_a_second_a_gflop)
    axes = (
        Axis("batch", (1, 2, 4), lambda n: [f"train.batch_size={n}"]),
        Axis("text tokens", (4, 256), lambda _: [], tokens=int),
        Axis("parameters", (32, 64), lambda w: [f"unet.block_out_channels=[{w},{w},{w}]"]),
    )
    small = ("train.batch_size=1", "unet.sample_size=8", "unet.block_out_channels=[32,32,32]")
    reporter = SilentReporter()
    batch, tokens, parameters = growth.growth(1, "cpu", reporter, {"train-unet": Work("bench/unet", small, axes)})
    assert reporter.messages[1] == "measuring train-unet against text tokens"
    assert (batch["work"], batch["against"], batch["points"]) == ("train-unet", "batch", [1, 2, 4])
    assert batch["step_ms"] == pytest.approx([1e3 * value for value in batch["gflop"]], rel=0.1)
    assert batch["exponent"] == pytest.approx(1.0, abs=0.02)  # the embedding of the step is a product per batch, too
    assert batch["cpu_exponent"] == 0.0
    for row in (batch, tokens, parameters):
        assert row["exponent"] == pytest.approx(row["gflop_exponent"])
        assert row["exponent_by_gflop"] == pytest.approx(1.0)
    assert 0.0 < tokens["exponent"] < batch["exponent"]
    assert tokens["points"] == [4, 256]
    assert parameters["points"][1] > 2 * parameters["points"][0] > 1e5


@pytest.mark.parametrize("name", growth.WORKS)
def test_every_point_of_every_series_is_a_recipe(name: str) -> None:
    work = growth.WORKS[name]
    for axis in work.axes:
        assert len(axis.values) >= 4
        recipes = [growth._workload(work, axis, value, "cpu") for value in axis.values]
        assert len(set(map(repr, recipes))) == len(recipes)


def test_real_runs_are_read_as_they_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "race", runs_in_this_process)
    rows = memory.memory(4, "cpu", SilentReporter())
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
    with pytest.raises(UsageError, match="3 steps are too few for a slope"):
        memory.memory(3, "cpu", SilentReporter())


def test_allocated_memory_is_what_is_held() -> None:
    before = memory.allocated_bytes()
    if before is None:
        pytest.skip("this malloc does not tell")
    held = torch.ones(64 * _MIB, dtype=torch.uint8)
    assert (memory.allocated_bytes() or 0) - before == pytest.approx(len(held), rel=0.1)
    del held
    assert (memory.allocated_bytes() or 0) - before == pytest.approx(0, abs=_MIB)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only /proc tells a program's own peak")
def test_a_contender_does_not_begin_at_the_peak_of_this_process() -> None:
    large = bytearray(900 * _MIB)
    large[:: 1 << 12] = b"x" * len(large[:: 1 << 12])  # every page is taken
    (lap,) = race([Contender("idle", Idle)], rounds=1, warmup=0).values()
    assert 50 * _MIB < lap.peak_bytes < len(large)


class Where(Idle):
    """Tells where it runs."""

    def facts(self) -> dict[str, Any]:
        return {"processors": os.sched_getaffinity(0), "threads": torch.get_num_threads()}


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system does not bind processes")
def test_contenders_of_one_thread_run_on_the_same_processor() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        laps = race([Contender("a", Where), Contender("b", Where)], rounds=1, warmup=0, one_processor=True)
    finally:
        torch.set_num_threads(before)
    assert [laps[name].facts for name in "ab"] == [{"processors": {min(os.sched_getaffinity(0))}, "threads": 1}] * 2
    (free,) = race([Contender("a", Where)], rounds=1, warmup=0).values()
    assert free.facts["processors"] == os.sched_getaffinity(0)


def test_what_fails_in_a_race_is_told_as_it_is() -> None:
    here, there = Pipe()
    here.send(("run", 1))
    thread = Thread(target=_serve, args=(there, Failing, (), "cpu", torch.get_num_threads(), False))
    thread.start()
    assert here.recv() == ("ready", None)
    kind, error = here.recv()
    here.close()
    thread.join()
    assert kind == "error"
    assert isinstance(error, DataError)
    assert (error.what, error.cause, error.remedy) == ("no sample can be used", "all are bad", "look at them")
