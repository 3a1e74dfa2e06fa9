"""Write pictures in a thread while the next ones are generated, so that the device does not wait for compression."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
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
    waiting: deque[tuple[int, Tensor]] = deque()
    failure: list[BaseException] = []
    changed, closed = threading.Condition(), threading.Event()

    def work() -> None:
        compute_alone()
        while True:
            with changed:
                changed.wait_for(lambda: waiting or closed.is_set())
                if not waiting:
                    return
                index, pixels = waiting[0]
            try:
                write(index, pixels)
            except BaseException as error:
                failure.append(error)
            with changed:
                waiting.popleft()
                if failure:
                    waiting.clear()
                changed.notify_all()

    def hand_over(index: int, pixels: Tensor) -> None:
        with changed:
            if not failure:
                waiting.append((index, pixels))
                changed.notify_all()
            changed.wait_for(lambda: sum(picture.nbytes for _, picture in waiting) <= _MOST_WAITING_BYTES)
        if failure:
            raise failure[0]

    thread = threading.Thread(target=work, name="ldm-writer", daemon=True)
    thread.start()
    try:
        yield hand_over
    finally:
        with changed:
            closed.set()
            changed.notify_all()
        thread.join()
    if failure:
        raise failure[0]
