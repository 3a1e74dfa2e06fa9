"""A bounded folder of the cache in which remote shards are kept, and the threads that fetch the next ones ahead.

A shard is fetched whole. It is fetched again when the size, time or tag that its server reports is another.
The least recently used shards make room for new ones, except those that a running process has open.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ldm_cli.data.bounded_folder import BoundedFolder
from ldm_cli.data.index_cache import Stamp
from ldm_cli.data.remote import (
    CHUNK,
    FetchingFailed,
    chunks_of,
    name_of,
    named,
    permanent_error,
    server_facts,
    server_stamp,
    without_credentials,
)
from ldm_cli.errors import DataError, LdmError, StorageError
from ldm_cli.inputs import read_input
from ldm_cli.reporting import Reporter
from ldm_cli.storage import user_cache, whole_file, write_whole

T = TypeVar("T")

_CONNECTIONS = 4
"""Shards that one process fetches ahead at the same time."""
_FACTS = "facts.json"
_PAUSES = (0.5, 2.0, 8.0)
"""Seconds before the second, third and fourth attempt."""
_PATIENCE = 60.0
"""Seconds to wait for room that other processes take."""


class UnreachableError(StorageError):
    """A server does not answer, also after several attempts."""


def place_of(url: str) -> Path:
    """The local file of a remote shard."""
    folder = _folder() / sha256(name_of(url).encode()).hexdigest()[:32]
    return folder / (Path(urlsplit(without_credentials(url)).path).name or "shard")


def forget_fetched(file: Path) -> None:
    """Let the next start fetch this damaged shard again, if it was fetched."""
    if file.parent.parent == _folder():
        with suppress(OSError):
            (file.parent / _FACTS).unlink()


def _folder() -> Path:
    return user_cache() / "shards"


class StagingArea:
    """The folder that remote shards are fetched into; safe for several threads and processes, and after a fork.

    Args:
        max_bytes: of all shards in the folder.
        reporter: receives messages about fetched shards and repeated attempts.
    """

    def __init__(self, max_bytes: int, reporter: Reporter) -> None:
        self._room = BoundedFolder(_folder(), max_bytes)
        self._reporter = reporter
        self._is_out_of_reach = False
        self._ahead: queue.SimpleQueue[tuple[str, Stamp]] | None = None
        self._pid = 0

    def stamp(self, url: str) -> Stamp:
        """What the server says of a shard now; if it does not answer, what it said of the copy that is here.

        Raises:
            InputNotFoundError, UnavailableError, StorageError: as `fetch`.
        """
        shown = without_credentials(url)
        try:
            return self._persistent(shown, lambda: server_stamp(server_facts(url)))
        except UnreachableError as error:
            self._is_out_of_reach = True
            if (known := _known(place_of(url))) is None:
                raise
            self._reporter.warn(
                f"cannot ask whether '{shown}' has changed ({error.cause}): using the copy that was fetched before"
            )
            return server_stamp(known)

    def fetch(self, url: str, expected: Stamp) -> Path:
        """The local file of a remote shard, fetched unless it is there and unchanged. It stays until `release`, or
        until this object is gone, unless this object needs its room for another one.

        An attempt that fails for a temporary reason is repeated three times.

        Args:
            expected: the stamp that the shard must have.

        Raises:
            InputNotFoundError: there is no such shard.
            UnavailableError: a package that its scheme needs is not installed.
            StorageError: it could not be fetched, or the shards in use exceed the bound.
            DataError: it is not the expected one.
        """
        shown = without_credentials(url)
        return self._persistent(shown, lambda: self._fetch(url, shown, expected, ahead=False))

    def fetch_ahead(self, shards: Iterable[tuple[str, Stamp]]) -> None:
        """Fetch these in threads, in this order, as far as there is room; failures are left to `fetch`."""
        if self._ahead is None or os.getpid() != self._pid:
            self._ahead, self._pid = queue.SimpleQueue(), os.getpid()
            for _ in range(_CONNECTIONS):
                threading.Thread(target=self._fetch_all, args=(self._ahead,), daemon=True).start()
        for one in shards:
            self._ahead.put(one)

    def release(self, file: Path) -> None:
        """Let a fetched shard give way to others."""
        self._room.release(file.parent)

    def _fetch_all(self, ahead: queue.SimpleQueue[tuple[str, Stamp]]) -> None:
        while True:
            url, stamp = ahead.get()
            with suppress(Exception):
                self._fetch(url, without_credentials(url), stamp, ahead=True)

    def _persistent(self, shown: str, attempt: Callable[[], T]) -> T:
        """The result of an attempt, which is repeated after a temporary failure."""
        for pause in (*(() if self._is_out_of_reach else _PAUSES), None):
            try:
                return attempt()
            except LdmError:
                raise
            except Exception as error:
                permanent = permanent_error(error, shown)
                if permanent is not None:
                    raise permanent from None
                if pause is None:
                    remedy = "check the address and your access rights"
                    raise UnreachableError(f"cannot fetch shard '{shown}'", named(error), remedy) from None
                self._reporter.warn(f"fetching '{shown}' failed ({named(error)}): next attempt in {pause:g} s")
            time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _fetch(self, url: str, shown: str, expected: Stamp, ahead: bool) -> Path:
        target = place_of(url)
        place = target.parent
        with self._room.locked(f".fetching-{place.name[:2]}"):  # others wait here for the same shard
            if not self._is_here(target, expected, ahead):
                facts = server_facts(url)
                if server_stamp(facts) != expected:
                    raise DataError(
                        f"shard '{shown}' has changed since it was indexed",
                        "its server reports another size, time or tag",
                        "do not change shards while they are in use; run the same command again",
                    )
                self._room.remove(place)
                try:
                    self._download(url, shown, target, facts, ahead)
                except BaseException:
                    self._room.remove(place)
                    raise
                self._room.use(place, holds=not ahead)
        return target

    def _is_here(self, target: Path, expected: Stamp, ahead: bool) -> bool:
        """Whether the expected shard is here; then it is used now."""

        def is_expected() -> bool:
            known = _known(target)
            return known is not None and server_stamp(known) == expected

        return self._room.use(target.parent, not ahead, is_expected)

    def _download(self, url: str, shown: str, target: Path, facts: dict[str, Any], ahead: bool) -> None:
        announced, done = facts.get("size"), 0
        patience = 0.0 if ahead else _PATIENCE
        room = announced or 0
        self._room.reserve(room, target.parent, shown, patience, gives_way=not ahead)
        if not ahead:
            self._reporter.info(f"fetching '{shown}'")
        chunks = chunks_of(url)
        first = next(chunks, b"")  # an error here is the server's; within `whole_file` it would be the disk's
        with whole_file(target) as partial, partial.open("wb") as file:
            for chunk in chain((first,), chunks):
                done += len(chunk)
                if done > room:
                    room = done + CHUNK
                    self._room.reserve(room, target.parent, shown, patience, gives_way=not ahead)
                file.write(chunk)
            if announced is not None and done != announced:
                raise FetchingFailed(f"received {done} bytes of {announced}")
        if server_facts(url) != facts:
            raise FetchingFailed("the shard changed while it was fetched")
        write_whole(target.parent / _FACTS, json.dumps(facts))


def _known(target: Path) -> dict[str, Any] | None:
    """What its server said of a shard that is here and complete; None if it is not."""
    try:
        known: dict[str, Any] = json.loads(read_input(target.parent / _FACTS))
        is_whole = target.stat().st_size == known.get("size", target.stat().st_size)
    except (OSError, LdmError, ValueError, AttributeError):
        return None
    return known if is_whole else None
