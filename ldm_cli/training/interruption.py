"""Stop requests: signals and the time limit. The loop asks after each step; a second signal ends the
process at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Self

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Context in which SIGTERM, SIGINT and SIGUSR1 set `reason` instead of ending the process.

    The first signal is answered at the end of the step; a second SIGTERM or SIGINT exits with 143 or 130
    without cleaning up, which the checkpoint protocol survives.
    """

    def __init__(self, max_seconds: float | None = None) -> None:
        self.deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self._signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    @property
    def reason(self) -> str | None:
        """Why to stop, or None to go on."""
        if self._signal is not None:
            return f"received {self._signal.name}"
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return "reached --max-time"
        return None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number != signal.SIGUSR1:
            os._exit(128 + number)
        self._signal = signal.Signals(number)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._handle) for s in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
