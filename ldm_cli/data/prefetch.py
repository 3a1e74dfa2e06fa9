"""A background thread that stays a few items ahead of its consumer."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from typing import TypeVar

from ldm_cli.threads import compute_alone

Item = TypeVar("Item")


class _End:
    """Put after the last item, with the exception that ended the source, if one did."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


@contextmanager
def prefetched(source: Generator[Item], depth: int, *, alone: bool = False) -> Iterator[Iterator[Item]]:
    """Run `source` in a thread, at most `depth` items ahead. Leaving the context stops the thread and waits for it.

    With `alone` torch uses no further threads for that thread. Two teams of OpenMP threads would exceed the cores, and
    both would sleep between operations, the one that trains as well.

    An exception of `source` is raised in the consumer, after the items before it.
    """
    items: queue.Queue[Item | _End] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def produce() -> None:
        error: BaseException | None = None
        if alone:
            compute_alone()
        try:
            with closing(source):
                for item in source:
                    items.put(item)
                    if stopped.is_set():
                        return
        except BaseException as caught:
            error = caught
        items.put(_End(error))

    def consume() -> Iterator[Item]:
        while not isinstance(item := items.get(), _End):
            yield item
        if item.error is not None:
            raise item.error

    thread = threading.Thread(target=produce, name="ldm-prefetch", daemon=True)
    thread.start()
    try:
        yield consume()
    finally:
        stopped.set()
        while thread.is_alive():
            # The producer may wait for room in the queue; with room, it sees the request to stop.
            try:
                items.get(timeout=0.01)
            except queue.Empty:
                continue
        thread.join()
