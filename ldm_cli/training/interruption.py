"""Stop requests: signals and the time limit. The loop asks after each step; a second signal ends the process at
once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self

from ldm_cli.errors import LdmError, Preempted

_ANSWERED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_FATAL_TWICE = (signal.SIGTERM, signal.SIGINT)
_TIME_IS_UP = 1  # the number of SIGHUP, which is never a reason
TIME_LIMIT = "reached --max-time"
"""The reason of a stop at the time limit."""
MORE_TIME = "no step fitted into it: run the same command again, with more time"
"""The remedy when the limit came before the first step."""
SECONDS_APART = 0.1
"""Signals this close count as one: timeout(1) and batch queues signal the process and then its group."""


def hold_signals() -> None:
    """Block signals until `release_signals` or a `StopRequest`: a batch queue may send one during the imports, which
    take seconds."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _ANSWERED)


def release_signals() -> None:
    """Unblock signals; those that waited are delivered at once."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ANSWERED)


class InterruptNote:
    """Context in which Ctrl-C, SIGTERM and SIGUSR1 raise KeyboardInterrupt: files are left whole, a last line says why.

    `came` is the signal, 0 for none: compiled code of a library may turn the exception into another. An ignored signal
    stays ignored. A second SIGTERM or Ctrl-C ends the process at once, unless it is an echo of the first.
    """

    def __init__(self) -> None:
        self.came = 0
        self._came_at = 0.0
        self._process = os.getpid()
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        usual[signal.SIGUSR1] = signal.SIG_DFL
        if threading.current_thread() is threading.main_thread():
            for number, handler in usual.items():
                if signal.getsignal(number) is handler:
                    self._previous[number] = signal.signal(number, self._raise)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._raise:
                signal.signal(number, handler)  # type: ignore[arg-type]

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM and os.getpid() != self._process:
            os._exit(128 + number)
        if self.came:
            if number in _FATAL_TWICE and time.monotonic() - self._came_at > SECONDS_APART:
                os._exit(128 + number)
            return
        self.came, self._came_at = number, time.monotonic()
        raise KeyboardInterrupt


def stop_reason(code: int) -> str | None:
    """A `StopRequest.code` in words; None to go on."""
    if code == 0:
        return None
    return TIME_LIMIT if code == _TIME_IS_UP else f"received {signal.Signals(code).name}"


class StopRequest:
    """Context in which SIGTERM, SIGINT and SIGUSR1 set `code` instead of ending the process.

    The first signal is answered at the end of the step; a second SIGTERM or SIGINT exits with 143 or 130
    without cleaning up, which the checkpoint protocol survives. SIGHUP is ignored: a run outlives its terminal.
    Signals that were held back until now (`hold_signals`, or a launcher's block) are answered too.
    """

    def __init__(self, max_seconds: float | None = None) -> None:
        self.deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self._signal: signal.Signals | None = None
        self._at_once = False
        self._watcher: threading.Thread | None = None
        self._previous: dict[signal.Signals, object] = {}

    @property
    def code(self) -> int:
        """The reason to stop as a number that ranks can compare: of a signal, 1 for the time limit, 0 to go on."""
        if self._signal is not None:
            return int(self._signal)
        return _TIME_IS_UP if self.deadline is not None and time.monotonic() >= self.deadline else 0

    @property
    def reason(self) -> str | None:
        """The reason to stop; None to go on."""
        return stop_reason(self.code)

    @contextmanager
    def answered_at_once(self, *, with_limit: bool = True) -> Iterator[None]:
        """Within, a signal interrupts at once: for preparations, which have no step to finish.

        Args:
            with_limit: whether the time limit is checked before and after.

        Raises:
            Preempted: a signal came, or the time is up.
        """
        self._raise_if_requested(with_limit)
        try:
            self._at_once = True
            yield
        except LdmError:
            raise
        except BaseException:
            if self._signal is not None:  # a library may have replaced the exception
                self._raise_if_requested(with_limit)
            raise
        finally:
            self._at_once = False
        self._raise_if_requested(with_limit)

    def _raise_if_requested(self, with_limit: bool) -> None:
        reason = self.reason
        if reason is not None and (with_limit or reason != TIME_LIMIT):
            remedy = MORE_TIME if reason == TIME_LIMIT else "run the same command again to go on"
            raise Preempted("stopped before the first step", reason, remedy) from None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._signal = self._signal or signal.Signals(number)
        if self._at_once:
            raise KeyboardInterrupt

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            if "LDM_LAUNCHER_PID" not in os.environ:  # a launcher answers the second one itself
                self._watch()
            self._previous = {s: signal.signal(s, self._handle) for s in _ANSWERED}
            self._previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
            release_signals()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._previous:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}
        if self._watcher is not None:
            os.write(signal.set_wakeup_fd(self._previous_fd), b"\0")
            self._watcher.join()

    def _watch(self) -> None:
        """Start a thread that sees every signal as it arrives: Python's handlers wait until the main thread returns
        from a kernel, a write or a sync, which may take long."""
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        self._previous_fd = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        self._watcher = threading.Thread(
            target=_end_on_second, args=(reading, writing), name="ldm-signals", daemon=True
        )
        self._watcher.start()


def _end_on_second(reading: int, writing: int) -> None:
    """Read signal numbers, one byte each; 0 is the end."""
    first: float | None = None
    while number := os.read(reading, 1)[0]:
        now = time.monotonic()
        if first is not None and number in _FATAL_TWICE and now - first > SECONDS_APART:
            os._exit(128 + number)
        if number in _ANSWERED and first is None:
            first = now
    os.close(reading)
    os.close(writing)
