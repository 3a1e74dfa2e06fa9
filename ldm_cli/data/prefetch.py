"""A background thread that stays a few items ahead of its consumer."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any, TypeVar

from ldm_cli.threads import compute_alone

Item = TypeVar("Item")
_END: Any = object()


@contextmanager
def prefetched(source: Generator[Item], depth: int, *, alone: bool = False) -> Iterator[Iterator[Item]]:
    """Run `source` in a thread, at most `depth` items ahead. Leaving the context stops the thread and waits for it.

    With `alone` torch uses no further threads for that thread. Two teams of OpenMP threads would exceed the cores, and
    both would sleep between operations, the one that trains as well.

    An exception of `source` is raised in the consumer, after the items before it.
    """
    with closing(source), ThreadPoolExecutor(1, "ldm-prefetch", compute_alone if alone else None) as thread:
        ahead = deque(thread.submit(next, source, _END) for _ in range(depth))

        def consume() -> Iterator[Item]:
            while (item := ahead.popleft().result()) is not _END:
                ahead.append(thread.submit(next, source, _END))
                yield item

        try:
            yield consume()
        finally:
            thread.shutdown(cancel_futures=True)
