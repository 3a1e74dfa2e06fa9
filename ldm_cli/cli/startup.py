"""What makes a command that computes begin and end sooner: torch is most of the time that it takes to start."""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

_LIBRARIES = (("libtorch_global_deps.so", ctypes.RTLD_GLOBAL), ("libtorch.so", ctypes.DEFAULT_MODE))
"""In the order and in the way in which torch itself loads them."""


def load_torch_libraries() -> None:
    """Begin to load what `import torch` will load, beside all else that is imported before: 0.3 s on two cores."""
    spec = find_spec("torch") if sys.platform == "linux" and "torch" not in sys.modules else None
    if spec is not None and spec.origin is not None:
        with _interrupt_held():  # the thread inherits it: an interrupt is the main thread's
            threading.Thread(target=_load, args=(Path(spec.origin).parent / "lib",), daemon=True).start()


def _load(folder: Path) -> None:
    with suppress(OSError):  # torch knows what to do, or what to say
        for name, mode in _LIBRARIES:
            ctypes.CDLL(str(folder / name), mode)


@contextmanager
def importing() -> Iterator[None]:
    """Within, Ctrl-C waits and the search for reference cycles rests; what is there at the end is never searched.

    Imports make hundreds of thousands of objects that stay: searching them over and over is a tenth of `import torch`.
    An interrupt that comes while torch's compiled part imports numpy would be forgotten there, and numpy with it.
    """
    was_searching = gc.isenabled()
    with _interrupt_held():
        gc.disable()
        try:
            yield
        finally:
            gc.freeze()
            if was_searching:
                gc.enable()


@contextmanager
def _interrupt_held() -> Iterator[None]:
    """Within, SIGINT waits."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave(code: int) -> NoReturn:
    """End the process as `sys.exit` does, but let the kernel have back what Python would first take apart: 0.4 s."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are not daemons
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # closed, or nobody reads: `run` has said so
                stream.flush()
    finally:  # also if there is a Ctrl-C: everything is done
        os._exit(code)
