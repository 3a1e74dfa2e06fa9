"""Worker processes that make items ahead of their consumer and survive a signal to the whole process group.

A batch queue signals every process of a job. The trainer then finishes its step and saves, for which it needs its
workers. So they ignore these signals, and end when the trainer closes them or has ended.

Worker n mod N makes item n, so that items need no sorting. Each worker has its own socket and, for tensors, an
anonymous file in memory. There is no lock, no name in /dev/shm and no helper process, so that a worker may be killed at
any time and leaves nothing behind.

torch's DataLoader does not serve. When a worker dies, it raises in the main thread at any instruction, in the middle of
a save as well. Its time-out counts the time in which a job was stopped. Its tensors pass through /dev/shm, of which a
container has 64 MiB by default.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Generic, NoReturn, TypeVar

import torch

from ldm_cli.data.worker_transfer import pack, unpack
from ldm_cli.errors import WorkerError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Which workers ignore."""

_PARENT_IS_GONE = signal.SIGUSR2
_LENGTH_BYTES = 8
_PR_SET_PDEATHSIG = 1
_REMEDY = "run the same command again; if it recurs, lower data.num_workers"

Item = TypeVar("Item")


def made_by_workers(
    make: Callable[[int], Item],
    numbers: Sequence[int],
    *,
    num_workers: int,
    num_ahead: int,
    timeout: float,
    with_children: bool = False,
    interruption: threading.Event | None = None,
) -> Generator[Item]:
    """`make(n)` for each n of `numbers`, in their order.

    Args:
        make: runs in forked processes; its result may hold tensors anywhere, which are copied once on each side.
        numbers: of the items.
        num_workers: processes (N).
        num_ahead: items that each worker may be ahead.
        timeout: seconds without an answer after which a worker counts as hanging.
        with_children: workers start processes, which must not receive signals to our group and which end with them.
        interruption: another thread sets it to end the wait for an item within a second.

    Raises:
        WorkerError: a worker died or hangs, none could be started, or the wait was interrupted.
        Exception: of `make`, in place of its item.
    """
    num_workers = min(num_workers, len(numbers))
    workers: list[_Worker[Item]] = []
    try:
        for number in range(num_workers):
            part = numbers[number::num_workers]
            with _signals_blocked():  # one that came before the worker is listed would leave it running
                workers.append(_Worker(number, make, part, num_ahead, workers, with_children))
        for count in range(len(numbers)):
            yield workers[count % num_workers].receive(timeout, interruption)
    finally:
        for worker in workers:
            worker.close()


class _Worker(Generic[Item]):
    """One process, seen from its parent."""

    def __init__(
        self,
        number: int,
        make: Callable[[int], Item],
        numbers: Sequence[int],
        num_ahead: int,
        others: Sequence[_Worker[Item]],
        with_children: bool,
    ) -> None:
        self._number, self._with_children = number, with_children
        self._exit_code: int | None = None
        self._memory = _anonymous_file()
        self._socket, theirs = socket.socketpair()
        parent, in_main_thread = os.getpid(), threading.current_thread() is threading.main_thread()
        with theirs:  # the worker inherits the block of signals, so that none finds it unprepared
            try:
                self._pid = os.fork()
            except OSError as error:
                self._socket.close()
                os.close(self._memory)
                raise WorkerError("cannot start a data worker", os.strerror(error.errno or 0), _REMEDY) from error
            if self._pid == 0:
                for other in (*others, self):
                    other._socket.close()
                if with_children:
                    os.setsid()
                    signal.signal(_PARENT_IS_GONE, _kill_group)
                at_parents_end = _PARENT_IS_GONE if with_children else signal.SIGKILL
                _work(
                    lambda: _make_all(make, numbers, num_ahead, self._memory, theirs),
                    parent,
                    at_parents_end if in_main_thread else None,
                )

    def receive(self, timeout: float, interruption: threading.Event | None) -> Item:
        """The next item."""
        length = int.from_bytes(self._read(_LENGTH_BYTES, timeout, interruption), "little")
        answer = unpack(self._read(length, timeout, interruption))
        if isinstance(answer, BaseException):
            raise answer
        with suppress(OSError):  # the next read reports a worker that has ended
            self._socket.send(b"\0")  # the place of this item's tensors is free again
        item: Item = answer
        return item

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._socket.close()
        os.close(self._memory)
        if self._exit_code is None:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
                if self._with_children:  # its group, unless it had no time to found one
                    os.killpg(self._pid, signal.SIGKILL)
            self._wait(0)

    def _read(self, length: int, timeout: float, interruption: threading.Event | None) -> bytearray:
        # Time is counted in slices: a job that was stopped for an hour and continues must not time out.
        patience = max(1, math.ceil(timeout))
        self._socket.settimeout(timeout / patience)
        data, left = bytearray(), patience
        while len(data) < length:
            try:
                part = self._socket.recv(length - len(data))
            except TimeoutError:
                left -= 1
                if self._wait(os.WNOHANG):
                    raise self._death() from None
                if interruption is not None and interruption.is_set():
                    raise WorkerError("the wait for a data worker was interrupted") from None
                if not left:
                    raise WorkerError(
                        f"data worker {self._number} (pid {self._pid}) hangs",
                        f"no answer for {timeout:g} seconds",
                        "check whether the storage answers, or raise data.worker_timeout",
                    ) from None
                continue
            except ConnectionResetError:
                part = b""
            if not part:
                raise self._death()
            data, left = data + part, patience
        return data

    def _wait(self, options: int) -> bool:
        """Collect the process; whether it has ended."""
        try:
            pid, status = os.waitpid(self._pid, options)
        except ChildProcessError:  # it was collected elsewhere
            pid, status = self._pid, 0
        if pid:
            self._exit_code = os.waitstatus_to_exitcode(status)
        return bool(pid)

    def _death(self) -> WorkerError:
        deadline = time.monotonic() + 1  # its files are closed a moment before it can be collected
        while self._exit_code is None and not self._wait(os.WNOHANG) and time.monotonic() < deadline:
            time.sleep(0.005)
        code = self._exit_code
        if code is None:
            how = "it closed its connection"
        else:
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        remedy = _REMEDY if code != -signal.SIGKILL else f"is memory short? {_REMEDY}"
        return WorkerError(f"data worker {self._number} (pid {self._pid}) died", how, remedy)


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Let the system send this process a signal when the thread that started it ends; only on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def _anonymous_file() -> int:
    """Descriptor of a file in memory, or on disk on systems without such files; the same number after a fork."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("ldm-worker")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


@contextmanager
def _signals_blocked() -> Iterator[None]:
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _kill_group(number: int, frame: object) -> None:
    """End a worker together with the processes that it started."""
    os.killpg(0, signal.SIGKILL)


def _work(make_all: Callable[[], None], parent: int, at_parents_end: signal.Signals | None) -> NoReturn:
    """Run a worker; never returns into the code that forked it."""
    code = 1
    try:
        gc.freeze()  # finalizers of the parent's objects must not run here
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        # The socket of a killed parent closes, which ends this process at the next item; the signal ends it at once. It
        # is bound to the thread that forked, so only the main thread's end means the parent's.
        if at_parents_end is not None:
            die_with_parent(at_parents_end)
        torch.set_num_threads(1)
        if os.getppid() == parent:
            make_all()
        code = 0
    finally:
        os._exit(code)


def _make_all(
    make: Callable[[int], object], numbers: Sequence[int], num_ahead: int, memory: int, parent: socket.socket
) -> None:
    for count, number in enumerate(numbers):
        if count >= num_ahead and not parent.recv(1):  # waits until an item was taken
            return
        place = count % num_ahead
        try:
            data = pack(make(number), memory, place)
        except Exception as error:
            data = _portable(error, memory, place)
        try:
            parent.sendall(len(data).to_bytes(_LENGTH_BYTES, "little"))
            parent.sendall(data)
        except OSError:  # the parent closed the socket, or has ended
            return


def _portable(error: Exception, memory: int, place: int) -> bytes:
    """The exception with its traceback as a note, or a RuntimeError with the same text if it cannot be pickled."""
    error.add_note("in a data worker:\n" + "".join(traceback.format_exception(error)))
    try:
        data = pack(error, memory, place)
        unpack(data)
    except Exception:
        data = pack(RuntimeError("\n".join((repr(error), *error.__notes__))), memory, place)
    return data
