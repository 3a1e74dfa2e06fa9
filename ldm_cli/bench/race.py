"""Contenders take turns (A B A B …), so that the machine's load is the same for all.

Each has its own process, and thereby its own peak of memory, allocator settings and imports.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, NoReturn

import torch

from ldm_cli.errors import LdmError, UnavailableError, WorkerError


class Lap(NamedTuple):
    """The measurements of one turn.

    Attributes:
        units: images, pairs or samples.
        seconds: wall time.
        cpu_seconds: processor time of the contender's process, all threads together.
        peak_bytes: most memory held so far: resident, of the whole process, on a CPU; allocated on a GPU.
    """

    units: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int


class RaceOver(Exception):
    """There are no more turns. It ends the work of a contender."""


class Turns:
    """The turns of one contender, in its own process."""

    def __init__(self, connection: Connection, device: str) -> None:
        self._connection, self._device = connection, device
        self._begin()

    def _begin(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def done(self, units: int) -> None:
        """A turn of so many units is done; return when the next one begins.

        Raises:
            RaceOver: there is none.
        """
        wait_for(self._device)
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        self._connection.send(Lap(units, wall, cpu, _peak_bytes(self._device)))
        with suppress(EOFError):
            if self._connection.recv():
                self._begin()
                return
        raise RaceOver

    def repeat(self, units: int, work: Callable[[], object]) -> NoReturn:
        """Do the work, which has so many units, once in each turn; raises as `done`."""
        while True:
            work()
            self.done(units)


@dataclass(frozen=True)
class Contender:
    """An implementation of the work.

    Attributes:
        name: unique, for the results.
        run: a function of a module, `run(turns, *arguments)`, called in the contender's own process. It works until
            `turns` raises `RaceOver`. The first turn, with all that comes before it, is not timed.
        arguments: of `run`; they must be picklable.
    """

    name: str
    run: Callable[..., None]
    arguments: tuple[Any, ...] = ()


def race(
    contenders: Sequence[Contender], *, rounds: int, device: str = "cpu", one_processor: bool = False
) -> dict[str, list[Lap]]:
    """Run all contenders in turn; the first one begins every round.

    Args:
        contenders: with different names.
        rounds: timed turns of each.
        device: where the work is done: `cpu` or `cuda`.
        one_processor: run all on the same processor, where the system allows it. Single-threaded work otherwise stays
            on the processor it began on, and one with a busy hyperthread sibling is slower by half.

    Raises:
        LdmError: of a contender.
        UnavailableError: another exception of a contender.
        WorkerError: a contender's process died, or its work ended before the race.
    """
    laps: dict[str, list[Lap]] = {contender.name: [] for contender in contenders}
    context, threads = multiprocessing.get_context("spawn"), 1 if one_processor else torch.get_num_threads()
    with ExitStack() as stack:
        connections: dict[str, Connection] = {}
        for contender in contenders:
            ours, theirs = context.Pipe()
            process = context.Process(target=_contend, args=(contender, theirs, device, threads, one_processor))
            process.start()
            theirs.close()
            stack.callback(process.join)
            connections[contender.name] = stack.enter_context(ours)
            _next_lap(contender.name, ours)
        for _ in range(rounds):
            for name, connection in connections.items():
                connection.send(True)
                laps[name].append(_next_lap(name, connection))
    return laps


def speed(name: str, laps: Sequence[Lap], ours: Sequence[Lap]) -> dict[str, Any]:
    """The speed of one contender; `speedup` is ours against it, the median over the rounds: above 1 we are faster."""
    return {
        "contender": name,
        "per_second": median(lap.units / lap.seconds for lap in laps),
        "speedup": median(_rate(a) / _rate(b) for a, b in zip(ours, laps, strict=True)),
    }


def speed_and_memory(results: Mapping[str, Sequence[Lap]]) -> list[dict[str, Any]]:
    """One row per contender, ours first: `speed`, and what the process itself takes; `memory_ratio` is ours to it."""
    ours = next(iter(results.values()))
    return [
        speed(name, laps, ours)
        | {
            "cpu_ms_per_unit": median(1e3 * lap.cpu_seconds / lap.units for lap in laps),
            "peak_mib": laps[-1].peak_bytes / 2**20,
            "memory_ratio": ours[-1].peak_bytes / laps[-1].peak_bytes,
        }
        for name, laps in results.items()
    ]


def wait_for(device: str) -> None:
    """Wait until a CUDA device has done its work; a CPU has nothing outstanding."""
    if device == "cuda":
        torch.cuda.synchronize()


def _rate(lap: Lap) -> float:
    return lap.units / lap.seconds


def _next_lap(name: str, connection: Connection) -> Lap:
    try:
        result = connection.recv()
    except (EOFError, ConnectionError):
        raise WorkerError(f"benchmark process '{name}' died", "it ended without a result") from None
    if isinstance(result, Exception):
        raise result
    assert isinstance(result, Lap)
    return result


def _contend(contender: Contender, connection: Connection, device: str, num_threads: int, one_processor: bool) -> None:
    """The process of a contender: send its laps, or the error that ended it."""
    if one_processor and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(num_threads)
    try:
        contender.run(Turns(connection, device), *contender.arguments)
        error: LdmError = WorkerError(f"'{contender.name}' has no more work", "there is less of it than the race takes")
    except RaceOver:
        return
    except LdmError as raised:
        error = raised
    except Exception as raised:
        error = UnavailableError(f"'{contender.name}' cannot do this work", f"{type(raised).__name__}: {raised}")
    connection.send(error)


def _peak_bytes(device: str) -> int:
    """Peak of this process, from /proc where it exists, as `ru_maxrss` includes the peak of the parent process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii", errors="replace").splitlines() if status.exists() else []
    peaks = [1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peaks[0] if peaks else peak if sys.platform == "darwin" else 1024 * peak
