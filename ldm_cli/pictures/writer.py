"""Write pictures in a thread while the next ones are generated, so that the device does not wait for compression."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from torch import Tensor

from ldm_cli.threads import compute_alone

_MOST_WAITING_BYTES = 64 << 20

Write = Callable[[int, Tensor], None]


@contextmanager
def written_meanwhile(write: Write) -> Iterator[Write]:
    """A function in place of `write` that passes the pictures to a thread, in order, and waits only if many are
    pending.

    Leaving the context, also by an exception, waits until all pending pictures are written. An exception of `write` is
    raised by the next call or on leaving, and nothing more is written.
    """
    waiting: deque[tuple[int, Future[None]]] = deque()  # bytes of each picture, and its writing
    failure: list[BaseException] = []

    def attempt(index: int, pixels: Tensor) -> None:
        if not failure:
            try:
                write(index, pixels)
            except BaseException as error:
                failure.append(error)

    with ThreadPoolExecutor(1, "ldm-writer", compute_alone) as thread:

        def hand_over(index: int, pixels: Tensor) -> None:
            waiting.append((pixels.nbytes, thread.submit(attempt, index, pixels)))
            while waiting and (waiting[0][1].done() or sum(size for size, _ in waiting) > _MOST_WAITING_BYTES):
                waiting.popleft()[1].result()
            if failure:
                raise failure[0]

        yield hand_over
    if failure:
        raise failure[0]
