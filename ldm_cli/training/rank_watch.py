"""How the ranks of one job notice that one of them is gone, and tell one another why."""

from __future__ import annotations

import json
import threading
from contextlib import suppress
from datetime import timedelta

from torch.distributed import Store  # type: ignore[attr-defined]  # exported without a word

POLL = timedelta(milliseconds=500)
"""How often whoever waits for other ranks asks the watch."""
TELLING = 3.0
"""Seconds in which a rank that fails tells why, and the others hear of it."""
_STORE_TIMEOUT = timedelta(seconds=5)


class RankWatch(threading.Thread):
    """Gives a sign of life every second; rank 0 looks for those of all others, and each of them for rank 0's.

    Silence is counted in signs of one's own, not in time: a job that was stopped and continued as a whole finds
    nobody silent. Where rank 0 serves the store and is stopped, no request to the store returns, with or without a
    time-out of its own: so this thread alone waits for answers, and who waits for other ranks looks at this thread.

    Attributes:
        verdict: what failed, and why; None while all are well.
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
        self._beats_when_asked, self._silence = 0, 0.0
        self.verdict: tuple[str, str] | None = None
        self._beat()

    def run(self) -> None:
        """Until the job ends or a rank is found lost."""
        while not self._ended.wait(self._interval) and self.verdict is None:
            self._beats += 1
            try:
                self._beat()
                self.verdict = announced(self._store)
                signs = self._store.multi_get([f"life/{rank}" for rank in self._watched])
            except RuntimeError:  # the store is silent or gone, and rank 0 with it
                signs = [self._last_seen.get(rank, (b"", 0))[0] for rank in self._watched]
            for rank, sign in zip(self._watched, signs, strict=True):
                self._judge(rank, sign)

    def asked(self) -> tuple[str, str] | None:
        """The verdict; whoever waits for other ranks asks every half second, which counts the store's silence."""
        if self._beats != self._beats_when_asked:
            self._beats_when_asked, self._silence = self._beats, 0.0
        else:
            self._silence += POLL.total_seconds()
        if self._silence > self._timeout + self._interval:
            self.verdict = self.verdict or self._lost(0)
        return self.verdict

    def end(self) -> None:
        """Stop and wait for it, unless the store has fallen silent."""
        self._ended.set()
        self.join(_STORE_TIMEOUT.total_seconds())

    def _beat(self) -> None:
        self._store.set(f"life/{self._rank}", str(self._beats))

    def _lost(self, rank: int) -> tuple[str, str]:
        return f"rank {rank} of {self._world_size} is lost", f"it gave no sign of life for {self._timeout:g} s"

    def _judge(self, rank: int, sign: bytes) -> None:
        before, beat = self._last_seen.get(rank, (None, self._beats))
        if sign != before:
            self._last_seen[rank] = (sign, self._beats)
        elif (self._beats - beat) * self._interval > self._timeout and self.verdict is None:
            self.verdict = self._lost(rank)
            announce(self._store, *self.verdict)


def announce(store: Store, what: str, reason: str) -> None:
    """Leave what failed, unless something has before; a store that does not answer is not waited for."""

    def leave() -> None:
        with suppress(RuntimeError):
            store.compare_set("failure", "", json.dumps([what, reason]))

    telling = threading.Thread(target=leave, daemon=True)
    telling.start()
    telling.join(TELLING)


def announced(store: Store) -> tuple[str, str] | None:
    """What the first rank to fail left."""
    try:
        if not store.check(["failure"]):
            return None
        what, reason = json.loads(store.get("failure"))
    except RuntimeError:
        return None
    return what, reason
