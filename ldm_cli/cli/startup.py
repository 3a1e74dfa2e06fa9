"""How a command imports what it computes with."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Context of imports, at whose end a Ctrl-C that came meanwhile raises KeyboardInterrupt.

    If it were raised while torch's compiled part imports numpy, torch would discard it and go on without numpy.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
