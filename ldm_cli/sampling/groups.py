"""Which images are drawn together, and by whom: one group by all threads, or several side by side, by one thread each.

A thread that works alone waits for no other one at the end of every layer: eight pictures of 16×16 latents come 1.07
times as fast from two threads with four each, sixteen 1.15 times (AMD EPYC, two cores). Smaller groups cost more than
that gains.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_cli.threads import compute_alone

_MOST_LANES = 8


@dataclass(frozen=True)
class Group:
    """Images that go through the network together.

    Attributes:
        start: the first one's place in the job.
        count: how many there are.
        rows: how many they are filled up to.
    """

    start: int
    count: int
    rows: int


def rounds(
    total: int, size: int, lanes: int, by_all: Callable[[int], int], alone: Callable[[int], int]
) -> Iterator[list[Group]]:
    """Groups of `total` images, in order: those of one list are drawn side by side, a list of one by all threads.

    Args:
        total: images to draw.
        size: images that a group has at most.
        lanes: groups that can be drawn side by side.
        by_all: number of images → how many to fill a group of them up to.
        alone: the same of a group that one thread draws; 0 where it may not.
    """
    start = 0
    while start < total:
        each = min(size, -(-(total - start) // lanes))
        # Large images, of which one fills a group, would need memory for each lane.
        rows = alone(each) if min(lanes, size) > 1 and each >= -(-size // 2) else 0
        if rows:
            starts = range(start, min(total, start + lanes * each), each)
            yield [Group(first, min(each, total - first), rows) for first in starts]
            start += lanes * each
        else:
            count = min(size, total - start)
            yield [Group(start, count, by_all(count))]
            start += count


class _Stopped(Exception):
    """Another lane failed, or nobody waits any more."""


Task = Callable[[Callable[[], None]], Tensor]
"""(what raises once the work is in vain, to be called now and then) → the result."""


class Lanes:
    """Threads that work side by side, each of which computes alone; a context, after which they are at rest."""

    def __init__(self, count: int) -> None:
        self._threads = ThreadPoolExecutor(count, "ldm-lane", initializer=compute_alone)
        self._stopped = threading.Event()

    def __enter__(self) -> Lanes:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        self._threads.shutdown()

    def run(self, tasks: Sequence[Task]) -> list[Tensor]:
        """The tasks' results: of a single one by the calling thread, of several by a lane each.

        What a task raises is raised, at once; leaving the context then waits until the others have noticed.
        """
        if len(tasks) == 1:
            return [tasks[0](_go_on)]
        futures = [self._threads.submit(task, self._go_on) for task in tasks]
        for future in wait(futures, return_when=FIRST_EXCEPTION).done:
            future.result()
        return [future.result() for future in futures]

    def _go_on(self) -> None:
        if self._stopped.is_set():
            raise _Stopped


def _go_on() -> None:
    """Always."""


def lanes_here() -> int:
    """How many lanes this process may compute in: one for each thread of torch's, if these are few."""
    threads = torch.get_num_threads()
    return threads if threads <= _MOST_LANES else 1


def by_one_thread(compute: Callable[[], list[Tensor]]) -> list[Tensor]:
    """What `compute` returns when it is called by a thread that computes alone."""
    with ThreadPoolExecutor(1, initializer=compute_alone) as thread:
        return thread.submit(compute).result()
