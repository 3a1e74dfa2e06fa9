"""Items that are made ahead of their consumer, by a thread or by worker processes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any, TypeVar

from ldm_cli.data.workers import made_by_workers
from ldm_cli.threads import compute_alone

NUM_AHEAD = 2
"""Items that a thread, or each worker, may be ahead of the consumer."""

Item = TypeVar("Item")
_END: Any = object()


def made_ahead(
    make: Callable[[int], Item],
    numbers: Sequence[int],
    *,
    num_workers: int,
    timeout: float,
    with_children: bool = False,
    interruption: threading.Event | None = None,
) -> Generator[Item]:
    """`make(n)` for each n of `numbers`, in their order; by a thread if `num_workers` is 0.

    Arguments and exceptions are those of `made_by_workers`.
    """
    if num_workers:
        yield from made_by_workers(
            make,
            numbers,
            num_workers=num_workers,
            num_ahead=NUM_AHEAD,
            timeout=timeout,
            with_children=with_children,
            interruption=interruption,
        )
    else:
        with prefetched((make(number) for number in numbers), alone=True) as items:
            yield from items


@contextmanager
def prefetched(source: Generator[Item], *, alone: bool = False) -> Iterator[Iterator[Item]]:
    """Run `source` in a thread, a few items ahead. Leaving the context stops the thread and waits for it.

    With `alone` torch uses no further threads for that thread. Two teams of OpenMP threads would exceed the cores, and
    both would sleep between operations, the one that trains as well.

    An exception of `source` is raised in the consumer, after the items before it.
    """
    with closing(source), ThreadPoolExecutor(1, "ldm-prefetch", compute_alone if alone else None) as thread:
        ahead = deque(thread.submit(next, source, _END) for _ in range(NUM_AHEAD))

        def consume() -> Iterator[Item]:
            while (item := ahead.popleft().result()) is not _END:
                ahead.append(thread.submit(next, source, _END))
                yield item

        try:
            yield consume()
        finally:
            thread.shutdown(cancel_futures=True)
