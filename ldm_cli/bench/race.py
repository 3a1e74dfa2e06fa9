"""Contenders take turns (A B A B …), so that the machine's load is the same for all.

Each has its own process, and thereby its own peak of memory, allocator settings and imports.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch

from ldm_cli.errors import LdmError, UnavailableError, WorkerError


class Runner(Protocol):
    """The work to time."""

    def step(self) -> None:
        """Do the work once; the caller waits for the device."""

    def facts(self) -> dict[str, Any]:
        """Facts about the work: units per step, floating-point operations, a figure to compare."""


@dataclass(frozen=True)
class Contender:
    """An implementation of the work.

    Attributes:
        name: unique, for the results.
        build: a function of a module, `build(*arguments)` → `Runner`; called in the contender's own process.
        arguments: of `build`; they must be picklable.
    """

    name: str
    build: Callable[..., Runner]
    arguments: tuple[Any, ...] = ()


@dataclass
class Lap:
    """The measurements of one contender.

    Attributes:
        seconds: of every timed step, in order.
        cpu_seconds: processor time of the same steps, all threads together.
        peak_bytes: most memory held: resident, of the whole process, on a CPU; allocated on a GPU.
        base_bytes: resident before the first step, imports and weights included; 0 on a GPU.
        facts: from the runner.
    """

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    base_bytes: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Median seconds a step."""
        return statistics.median(self.seconds)

    @property
    def cpu_median(self) -> float:
        """Median processor seconds a step."""
        return statistics.median(self.cpu_seconds)


def race(
    contenders: Sequence[Contender],
    *,
    rounds: int,
    steps: int = 1,
    warmup: int = 2,
    device: str = "cpu",
    one_processor: bool = False,
) -> dict[str, Lap]:
    """Run all contenders in turn; the first one begins every round.

    Args:
        contenders: with different names.
        rounds: turns of each.
        steps: steps per turn, each timed.
        warmup: steps of each before the first turn, not timed.
        device: where the work is done: `cpu` or `cuda`.
        one_processor: run all on the same processor, where the system allows it. Single-threaded work otherwise stays
            on the processor it began on, and one with a busy hyperthread sibling is slower by half.

    Raises:
        LdmError: of a contender.
        WorkerError: a contender's process died.
    """
    laps = {contender.name: Lap() for contender in contenders}
    if len(laps) != len(contenders):
        raise ValueError(f"contenders share a name: {[c.name for c in contenders]}")
    with ExitStack() as stack:
        workers = {c.name: stack.enter_context(_Worker(c, device, one_processor)) for c in contenders}
        for name, worker in workers.items():
            laps[name].base_bytes = worker.ask("memory")
            worker.ask("run", warmup)
        for _ in range(rounds):
            for name, worker in workers.items():
                for wall, cpu in worker.ask("run", steps):
                    laps[name].seconds.append(wall)
                    laps[name].cpu_seconds.append(cpu)
        for name, worker in workers.items():
            laps[name].peak_bytes = worker.ask("memory")
            laps[name].facts = worker.ask("facts")  # last: counting operations takes memory of its own
    return laps


def speedup(ours: Lap, theirs: Lap) -> float:
    """Median over the rounds of their seconds divided by ours: above 1 we are faster."""
    return statistics.median(b / a for a, b in zip(ours.seconds, theirs.seconds, strict=True))


class _Worker:
    """The process of a contender, and requests to it."""

    def __init__(self, contender: Contender, device: str, one_processor: bool) -> None:
        self._name = contender.name
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        arguments = (there, contender.build, contender.arguments, device, torch.get_num_threads(), one_processor)
        self._process = context.Process(target=_serve, args=arguments)
        self._process.start()
        there.close()

    def __enter__(self) -> _Worker:
        self._answer()
        return self

    def __exit__(self, *_: object) -> None:
        self._here.close()
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def ask(self, question: str, number: int = 0) -> Any:
        """The answer to `facts`, `memory` or `run`."""
        self._here.send((question, number))
        return self._answer()

    def _answer(self) -> Any:
        try:
            kind, value = self._here.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            raise WorkerError(f"benchmark process '{self._name}' died", f"exit code {code}") from None
        if kind == "error":
            if isinstance(value, LdmError):
                raise value
            raise UnavailableError(f"'{self._name}' cannot do this work", str(value))
        return value


def _serve(
    connection: Connection,
    build: Callable[..., Runner],
    arguments: tuple[Any, ...],
    device: str,
    num_threads: int,
    one_processor: bool,
) -> None:
    """Run a contender's process: build the runner, answer requests, end when the other side closes."""
    if one_processor and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1 if one_processor else num_threads)
    try:
        runner = build(*arguments)
    except Exception as error:
        connection.send(("error", _portable(error)))
        return
    connection.send(("ready", None))
    while True:
        try:
            question, number = connection.recv()
        except (EOFError, OSError):
            return
        try:
            if question == "run":
                answer: Any = _timed(runner, number, device)
            else:
                answer = _memory(device) if question == "memory" else runner.facts()
            connection.send(("answer", answer))
        except Exception as error:
            connection.send(("error", _portable(error)))


def _portable(error: Exception) -> LdmError | str:
    """An LdmError that can be pickled, with its three parts as arguments; the text of any other error."""
    if not isinstance(error, LdmError):
        return f"{type(error).__name__}: {error}"
    error.args = (error.what, error.cause, error.remedy)
    return error


def _timed(runner: Runner, steps: int, device: str) -> list[tuple[float, float]]:
    """(wall, processor) seconds of each step."""
    laps = []
    for _ in range(steps):
        _wait(device)
        wall, cpu = time.perf_counter(), time.process_time()
        runner.step()
        _wait(device)
        laps.append((time.perf_counter() - wall, time.process_time() - cpu))
    return laps


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _memory(device: str) -> int:
    """Peak bytes so far."""
    return torch.cuda.max_memory_allocated() if device != "cpu" else peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Peak of this process's resident bytes.

    From /proc where it exists, as `ru_maxrss` includes the peak of the parent process.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        lines = []
    peaks = [1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if peaks:
        return peaks[0]
    return peak if sys.platform == "darwin" else 1024 * peak


def resident_bytes() -> int:
    """Resident bytes from /proc where it exists, else the peak."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_resident_bytes()
