"""A folder of bounded size that processes share: the entries least recently used make room for new ones.

Each entry is a folder. A process says in a lease, a locked file, which entries it uses; they stay while it runs.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ldm_cli.errors import StorageError
from ldm_cli.storage import open_output, storage_errors

_LEASE = ".lease-"
_ANNOUNCED = "announced"
_POLL = 0.2


class BoundedFolder:
    """One user of the folder; safe for several threads, and after a fork.

    Args:
        folder: made when it is needed.
        max_bytes: of all entries.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._begin()

    def _begin(self) -> None:
        """Use nothing yet; after a fork, what the parent uses stays its own."""
        self._pid = os.getpid()
        self._mutex = threading.RLock()
        self._lease: IO[str] | None = None
        self._held: set[str] = set()
        self._growing: set[str] = set()

    @contextmanager
    def locked(self, name: str = ".lock") -> Iterator[None]:
        """One thread of one process at a time; without a name, it may change the folder."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = os.fdopen(open_output(self._folder / name, os.O_RDWR), "r+b")
        except OSError as error:
            raise StorageError(f"cannot write '{self._folder}'", error.strerror or str(error)) from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def use(self, place: Path, holds: bool, is_right: Callable[[], bool] = lambda: True) -> bool:
        """Count an entry as used now if it `is_right`, and keep it until `release` if this process holds it."""
        with self._state(), self.locked():
            if not is_right():
                return False
            os.utime(place)
            self._growing.discard(place.name)
            if holds:
                self._held.add(place.name)
            self._write_lease()
            return True

    def release(self, place: Path) -> None:
        """Let an entry that this process holds give way to others."""
        if os.getpid() == self._pid and place.name in self._held:
            with self._state():
                self._held.discard(place.name)
                self._write_lease()

    def remove(self, place: Path) -> None:
        """Remove an entry."""
        with self._state(), self.locked():
            shutil.rmtree(place, ignore_errors=True)
            self._held.discard(place.name)
            self._growing.discard(place.name)
            self._write_lease()

    def reserve(self, size: int, place: Path, shown: str, patience: float, gives_way: bool) -> None:
        """Make room for an entry of `size` bytes, and an empty one if there is none; entries in use stay.

        Args:
            size: bytes that it will have.
            shown: what it is, for messages.
            patience: seconds to wait for other processes.
            gives_way: entries that this process alone holds are removed, too. An open file can still be read then.

        Raises:
            StorageError: the entries in use take too much.
        """
        deadline = time.monotonic() + patience
        while True:
            with self._state(), self.locked():
                taken = self._evict(size, place, gives_way)
                if taken + size <= self._max_bytes:
                    with storage_errors(place):
                        place.mkdir(exist_ok=True)
                        (place / _ANNOUNCED).write_text(str(size))
                    self._growing.add(place.name)
                    self._write_lease()
                    return
            if time.monotonic() >= deadline or size > self._max_bytes:
                raise StorageError(
                    f"cannot fetch shard '{shown}' of {size} bytes",
                    f"shards in use take {taken} bytes already, data.max_fetched_bytes={self._max_bytes}",
                    "raise it, or lower data.shuffle_window, or read shards in sequence by data.stream=true",
                )
            time.sleep(_POLL)

    @contextmanager
    def _state(self) -> Iterator[None]:
        if os.getpid() != self._pid:
            self._begin()
        with self._mutex:
            yield

    def _evict(self, size: int, place: Path, gives_way: bool) -> int:
        """Remove entries until `size` more bytes fit; how many bytes the others then take."""
        others = sorted((p for p in self._folder.iterdir() if p.is_dir() and p != place), key=_last_use)
        bytes_of = {p: _bytes_of(p) for p in others}
        in_use = self._in_use()
        for other in others:
            if sum(bytes_of.values()) + size <= self._max_bytes:
                break
            if gives_way and other.name in self._held - self._growing and in_use.count(other.name) == 1:
                self._held.discard(other.name)
            elif other.name in in_use:
                continue
            shutil.rmtree(other, ignore_errors=True)
            del bytes_of[other]
        return sum(bytes_of.values())

    def _write_lease(self) -> None:
        """Say which entries this process uses."""
        with storage_errors(self._folder):
            if self._lease is None:
                descriptor, _ = tempfile.mkstemp(prefix=_LEASE, dir=self._folder)
                self._lease = os.fdopen(descriptor, "w")
                fcntl.flock(self._lease, fcntl.LOCK_EX)  # until the last process that has it open ends
            self._lease.seek(0)
            self._lease.truncate()
            self._lease.write("\n".join(self._held | self._growing))
            self._lease.flush()

    def _in_use(self) -> list[str]:
        """Names of the entries that running processes use, once for each; leases of dead processes are removed."""
        names: list[str] = []
        for file in self._folder.glob(f"{_LEASE}*"):
            with suppress(FileNotFoundError), file.open() as lease:
                try:
                    fcntl.flock(lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    names += lease.read().split()
                else:
                    file.unlink()
        return names


def _last_use(place: Path) -> int:
    return place.stat().st_mtime_ns


def _bytes_of(place: Path) -> int:
    """What an entry takes, or will take once it is complete."""
    announced = 0
    with suppress(OSError, ValueError):
        announced = int((place / _ANNOUNCED).read_text())
    with suppress(OSError):
        return max(announced, sum(file.stat().st_size for file in place.iterdir()))
    return announced
