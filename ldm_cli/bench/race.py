"""Contenders take turns (A B A B …), so that the machine's load is the same for all.

Each has its own process, and thereby its own peak of memory, allocator settings and imports.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ldm_cli.errors import LdmError, UnavailableError, WorkerError


@dataclass(frozen=True)
class Runner:
    """The work to time.

    Attributes:
        step: does the work once; the caller waits for the device.
        units: images, pairs or samples of a step.
        facts: other facts about the work, computed after the last step.
    """

    step: Callable[[], object]
    units: int
    facts: Callable[[], dict[str, Any]] = dict


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
        units: of one step.
        seconds: of every timed step, in order.
        cpu_seconds: processor time of the same steps, all threads together.
        peak_bytes: most memory held: resident, of the whole process, on a CPU; allocated on a GPU.
        facts: from the runner.
    """

    units: int = 1
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


def race(
    contenders: Sequence[Contender],
    *,
    rounds: int,
    warmup: int = 2,
    device: str = "cpu",
    one_processor: bool = False,
) -> dict[str, Lap]:
    """Run all contenders in turn; the first one begins every round.

    Args:
        contenders: with different names.
        rounds: timed steps of each.
        warmup: steps of each before the first round, not timed.
        device: where the work is done: `cpu` or `cuda`.
        one_processor: run all on the same processor, where the system allows it. Single-threaded work otherwise stays
            on the processor it began on, and one with a busy hyperthread sibling is slower by half.

    Raises:
        LdmError: of a contender.
        UnavailableError: another exception of a contender.
        WorkerError: a contender's process died.
    """
    laps = {contender.name: Lap() for contender in contenders}
    context, threads = multiprocessing.get_context("spawn"), 1 if one_processor else torch.get_num_threads()
    with ExitStack() as stack:
        processes: dict[str, partial[Any]] = {}
        for contender in contenders:
            pool = stack.enter_context(ProcessPoolExecutor(1, context))
            processes[contender.name] = call = partial(_call, contender.name, pool)
            laps[contender.name].units = call(_prepare, contender, device, threads, one_processor)
        for call in processes.values():
            for _ in range(warmup):
                call(_timed_step)
        for _ in range(rounds):
            for name, call in processes.items():
                wall, cpu = call(_timed_step)
                laps[name].seconds.append(wall)
                laps[name].cpu_seconds.append(cpu)
        for name, call in processes.items():
            laps[name].peak_bytes = call(_peak_bytes)
            laps[name].facts = call(_facts)  # last: counting operations takes memory of its own
    return laps


def speed(name: str, lap: Lap, ours: Lap) -> dict[str, Any]:
    """The speed of one contender; `speedup` is ours against it, the median over the rounds: above 1 we are faster."""
    seconds = median(lap.seconds)
    return {
        "contender": name,
        "per_second": lap.units / seconds,
        "step_ms": 1e3 * seconds,
        "speedup": median(b / a for a, b in zip(ours.seconds, lap.seconds, strict=True)),
    }


def speed_and_memory(name: str, lap: Lap, ours: Lap) -> dict[str, Any]:
    """`speed`, and what the process itself takes; `memory_ratio` is ours against it."""
    return speed(name, lap, ours) | {
        "cpu_ms": 1e3 * median(lap.cpu_seconds),
        "peak_mib": lap.peak_bytes / 2**20,
        "memory_ratio": ours.peak_bytes / lap.peak_bytes,
    }


def _call(name: str, pool: ProcessPoolExecutor, function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function in a contender's process."""
    try:
        return pool.submit(function, *arguments).result()
    except LdmError:
        raise
    except BrokenProcessPool as error:
        raise WorkerError(f"benchmark process '{name}' died", str(error)) from None
    except Exception as error:
        raise UnavailableError(f"'{name}' cannot do this work", f"{type(error).__name__}: {error}") from error


_running: tuple[Runner, str]
"""The runner and the device of a contender's process."""


def _prepare(contender: Contender, device: str, num_threads: int, one_processor: bool) -> int:
    """Build the runner of this process: its units."""
    global _running
    if one_processor and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(num_threads)
    runner = contender.build(*contender.arguments)
    _running = runner, device
    return runner.units


def _timed_step() -> tuple[float, float]:
    """(wall, processor) seconds of one step."""
    runner, device = _running
    wait_for(device)
    wall, cpu = time.perf_counter(), time.process_time()
    runner.step()
    wait_for(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def wait_for(device: str) -> None:
    """Wait until a CUDA device has done its work; a CPU has nothing outstanding."""
    if device == "cuda":
        torch.cuda.synchronize()


def _facts() -> dict[str, Any]:
    return _running[0].facts()


def _peak_bytes() -> int:
    """Peak of this process, from /proc where it exists, as `ru_maxrss` includes the peak of the parent process."""
    if _running[1] == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii", errors="replace").splitlines() if status.exists() else []
    peaks = [1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peaks[0] if peaks else peak if sys.platform == "darwin" else 1024 * peak
