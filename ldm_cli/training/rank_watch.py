"""The watch by which the ranks of one job notice a lost rank, and the store entry that says why it failed."""

from __future__ import annotations

import json
import os
import threading
from contextlib import suppress
from datetime import timedelta

from torch.distributed import Store  # type: ignore[attr-defined]  # exported without a word

from ldm_cli.errors import WorkerError

POLL = timedelta(milliseconds=500)
"""Time between two looks at the watch, of a thread that waits for other ranks."""
TELLING = 3.0
"""Seconds in which a failing rank stores its reason, and the others read it."""
_STORE_TIMEOUT = timedelta(seconds=5)


class RankWatch(threading.Thread):
    """Counts up a number in the store every second (a beat); rank 0 watches the beats of all others, they watch its.

    Silence is measured in this rank's own beats, not in time: after a job was stopped and continued as a whole, no
    rank counts as silent. If rank 0 serves the store and is stopped, no request to the store returns, whatever its
    time-out. So this thread alone waits for answers; a thread that waits for other ranks looks at this one.

    Attributes:
        failure: what failed, and why; None while all are well.
        ends_process: whether the process ends with 82 when no thread has asked for `timeout` seconds after the failure.
            While a GPU waits for a lost rank, its queue fills up, and the thread that fills it cannot ask.
        is_answered: set when the process is about to end on its own.
    """

    def __init__(self, store: Store, rank: int, world_size: int, timeout: float) -> None:
        super().__init__(name="rank watch", daemon=True)
        store.set_timeout(min(_STORE_TIMEOUT, timedelta(seconds=timeout / 2)))
        self._store, self._rank, self._world_size, self._timeout = store, rank, world_size, timeout
        self._interval = min(1.0, timeout / 5)
        self._watched = range(1, world_size) if rank == 0 else range(1)
        self._last_seen: dict[int, tuple[bytes, int]] = {}
        self._ended = threading.Event()
        self._beats = 0
        self._asker = _Asker()
        self.failure: tuple[str, str] | None = None
        self.ends_process, self.is_answered = False, threading.Event()
        self._beat()

    def run(self) -> None:
        """Run until the job ends or a rank is lost."""
        while not self._ended.wait(self._interval) and self.failure is None:
            self._beats += 1
            try:
                self._beat()
                self.failure = announced(self._store)
                beats = self._store.multi_get([f"beat/{rank}" for rank in self._watched])
            except RuntimeError:  # the store is silent or gone, and rank 0 with it
                beats = [self._last_seen.get(rank, (b"", 0))[0] for rank in self._watched]
            for rank, beat in zip(self._watched, beats, strict=True):
                self._judge(rank, beat)
        if self.failure is not None and self.ends_process and not self.is_answered.wait(self._timeout):
            os._exit(WorkerError.code)

    def asked(self) -> tuple[str, str] | None:
        """The failure. A thread that waits for other ranks asks every `POLL`; the calls measure the store's silence."""
        asker = self._asker
        if self._beats != asker.beats:
            asker.beats, asker.silence = self._beats, 0.0
        else:
            asker.silence += POLL.total_seconds()
        if asker.silence > self._timeout + self._interval:
            self.failure = self.failure or self._lost(0)
        if self.failure is not None:
            self.is_answered.set()
        return self.failure

    def end(self) -> None:
        """Stop the thread and wait for it, unless the store no longer answers."""
        self._ended.set()
        self.join(_STORE_TIMEOUT.total_seconds())

    def _beat(self) -> None:
        self._store.set(f"beat/{self._rank}", str(self._beats))

    def _lost(self, rank: int) -> tuple[str, str]:
        return f"rank {rank} of {self._world_size} is lost", f"it has sent nothing for {self._timeout:g} s"

    def _judge(self, rank: int, beat: bytes) -> None:
        before, since = self._last_seen.get(rank, (None, self._beats))
        if beat != before:
            self._last_seen[rank] = (beat, self._beats)
        elif (self._beats - since) * self._interval > self._timeout and self.failure is None:
            self.failure = self._lost(rank)
            announce(self._store, *self.failure)


class _Asker(threading.local):
    """What each thread that asks has seen: beats of its own rank, and seconds since they last changed."""

    beats = 0
    silence = 0.0


def announce(store: Store, what: str, reason: str) -> None:
    """Store what failed and why, unless an earlier failure is there; does not wait for a store without answer."""

    def leave() -> None:
        with suppress(RuntimeError):
            store.compare_set("failure", "", json.dumps([what, reason]))

    writing = threading.Thread(target=leave, daemon=True)
    writing.start()
    writing.join(TELLING)


def announced(store: Store) -> tuple[str, str] | None:
    """What failed first and why; None while all is well."""
    try:
        if not store.check(["failure"]):
            return None
        what, reason = json.loads(store.get("failure"))
    except RuntimeError:
        return None
    return what, reason
