"""Remote shards: fetched whole through fsspec into a bounded folder of the cache, then read like local ones.

User, password and query of an address are never shown or stored. A shard is fetched again when the size, time or tag
that its server reports has changed. The least recently used shards make room for new ones, except those of a data set
that is open in this process or another.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from urllib.parse import urldefrag, urlsplit, urlunsplit

from ldm_cli.errors import InputNotFoundError, LdmError, StorageError, UnavailableError
from ldm_cli.inputs import read_input
from ldm_cli.reporting import Reporter
from ldm_cli.storage import open_output, storage_errors, user_cache, whole_file, write_whole

_FACTS = "facts.json"
_LEASE = ".lease-"
_CHUNK = 1 << 22
_TAGS = ("size", "ETag", "etag", "LastModified", "last_modified", "mtime", "md5Hash", "created")
_PAUSES = (0.5, 2.0, 8.0)
"""Seconds before the second, third and fourth attempt."""
_TEMPORARY = {408, 425, 429}
"""HTTP status codes below 500 that may not recur."""
_READ_TIMEOUT = 60
"""Seconds without data after which an attempt fails; the whole shard may take longer."""


def without_credentials(url: str) -> str:
    """The address for messages: without user, password, query and fragment."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def forget_fetched(file: Path) -> None:
    """Let the next start fetch this damaged shard again, if it was fetched."""
    if file.parent.parent == _folder():
        with suppress(OSError):
            (file.parent / _FACTS).unlink()


def _folder() -> Path:
    return user_cache() / "shards"


class _FetchingFailed(Exception):
    """Reading from the server failed, or gave another number of bytes than announced."""


class StagingArea:
    """The folder that remote shards are fetched into. The shards that this object fetched stay while it exists.

    Args:
        max_bytes: of all shards in the folder.
        reporter: receives messages about fetched shards and repeated attempts.
    """

    def __init__(self, max_bytes: int, reporter: Reporter) -> None:
        self._folder = _folder()
        self._max_bytes, self._reporter = max_bytes, reporter
        self._lease: IO[str] | None = None
        self._is_out_of_reach = False

    def fetch(self, url: str) -> Path:
        """The local file with the shard at `url`, fetched unless it is there and unchanged.

        An attempt that fails for a temporary reason is repeated three times.

        Raises:
            InputNotFoundError: there is no such shard.
            UnavailableError: a package that its scheme needs is not installed.
            StorageError: it could not be fetched, or the shards in use exceed the bound.
        """
        shown = without_credentials(url)
        for pause in (*(() if self._is_out_of_reach else _PAUSES), None):
            try:
                with self._locked():
                    return self._fetch(url, shown)
            except LdmError:
                raise
            except Exception as error:
                permanent = _permanent_error(error, shown)
                if permanent is not None:
                    raise permanent from None
                if pause is None:
                    self._is_out_of_reach = True
                    return self._fetched_before(url, shown, error)
                self._reporter.warn(f"fetching '{shown}' failed ({_named(error)}): next attempt in {pause:g} s")
            time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _fetch(self, url: str, shown: str) -> Path:
        from fsspec.core import url_to_fs  # a slow import, needed for remote shards alone

        place, target = self._place(url, shown)
        system, path = url_to_fs(url, **_options(url))
        facts = _facts(system.info(path))
        self._hold(place)
        if not _holds(place, target, facts):
            shutil.rmtree(place, ignore_errors=True)
            with storage_errors(place):
                place.mkdir()
            self._reporter.info(f"fetching '{shown}'")
            with system.open(path, "rb") as source, whole_file(target) as partial, partial.open("wb") as file:
                self._copy(source, file, facts.get("size"), place, shown)
            write_whole(place / _FACTS, json.dumps(facts))
        os.utime(place)
        return target

    def _place(self, url: str, shown: str) -> tuple[Path, Path]:
        """Folder and file of a shard."""
        # Shards may differ in the query alone; user and password do not matter.
        address = shown + "?" + urlsplit(urldefrag(url)[0]).query
        place = self._folder / hashlib.sha256(address.encode()).hexdigest()[:32]
        return place, place / (Path(urlsplit(shown).path).name or "shard")

    def _fetched_before(self, url: str, shown: str, error: Exception) -> Path:
        """The local copy of a shard whose server does not answer; a continued run compares the fingerprint of its data.

        Raises:
            StorageError: there is no copy.
        """
        place, target = self._place(url, shown)
        with self._locked():
            if not _holds(place, target, None):
                raise _failure(error, shown) from None
            self._hold(place)
        self._reporter.warn(
            f"cannot ask whether '{shown}' has changed ({_named(error)}): using the copy that was fetched before"
        )
        return target

    def _copy(self, source: IO[bytes], file: IO[bytes], announced: int | None, place: Path, shown: str) -> None:
        """Copy the shard and make room for it: beforehand if its size is announced, else as it grows."""
        room, done = announced or 0, 0
        self._make_room(room, place, shown)
        while chunk := _read(source):
            done += len(chunk)
            if done > room:
                room = done + _CHUNK
                self._make_room(room, place, shown)
            file.write(chunk)
        if announced is not None and done != announced:
            raise _FetchingFailed(f"received {done} bytes of {announced}")

    def _make_room(self, size: int, place: Path, shown: str) -> None:
        """Remove the least recently used shards until `size` bytes in `place` fit; shards in use stay."""
        others = sorted((p for p in self._folder.iterdir() if p.is_dir() and p != place), key=_last_use)
        held = {p: sum(file.stat().st_size for file in p.iterdir()) for p in others}
        in_use = self._in_use()
        for other in others:
            if sum(held.values()) + size <= self._max_bytes:
                return
            if other.name not in in_use:
                shutil.rmtree(other)
                del held[other]
        if sum(held.values()) + size > self._max_bytes:
            raise StorageError(
                f"cannot fetch shard '{shown}' of {size} bytes",
                f"shards in use take {sum(held.values())} bytes already, data.max_fetched_bytes={self._max_bytes}",
                "raise it, or read shards in sequence by data.stream=true",
            )

    def _hold(self, place: Path) -> None:
        """Mark `place` as in use by this process and those forked from it."""
        with storage_errors(place):
            if self._lease is None:
                descriptor, _ = tempfile.mkstemp(prefix=_LEASE, dir=self._folder)
                self._lease = os.fdopen(descriptor, "w")
                fcntl.flock(self._lease, fcntl.LOCK_EX)  # until the last process that has it open ends
            self._lease.write(f"{place.name}\n")
            self._lease.flush()

    def _in_use(self) -> set[str]:
        """Names of the places that running processes use; leases of dead processes are removed."""
        names: set[str] = set()
        for file in self._folder.glob(f"{_LEASE}*"):
            with file.open() as lease:
                try:
                    fcntl.flock(lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    names |= set(lease.read().split())
                else:
                    file.unlink()
        return names

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time changes the folder."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = os.fdopen(open_output(self._folder / ".lock", os.O_RDWR), "r+b")
        except OSError as error:
            raise StorageError(f"cannot write '{self._folder}'", error.strerror or str(error)) from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _last_use(place: Path) -> int:
    return place.stat().st_mtime_ns


def _options(url: str) -> dict[str, Any]:
    """Options of the back end: a timeout for silence, none for the whole shard."""
    if urlsplit(url).scheme.lower() not in ("http", "https"):
        return {}
    timeout = importlib.import_module("aiohttp").ClientTimeout(
        total=None, sock_connect=_READ_TIMEOUT, sock_read=_READ_TIMEOUT
    )
    return {"client_kwargs": {"timeout": timeout}}


def _read(source: IO[bytes]) -> bytes:
    """The next bytes; errors of the server get their own class, apart from those of the local disk."""
    try:
        return source.read(_CHUNK)
    except Exception as error:
        raise _FetchingFailed(_named(error)) from error


def _permanent_error(error: Exception, shown: str) -> LdmError | None:
    """An error of fsspec or a back end as ours, None if a new attempt may succeed. Its message may hold credentials,
    and is not repeated."""
    what, status = f"cannot fetch shard '{shown}'", _status(error)
    if isinstance(error, FileNotFoundError) and not _is_masked(error):
        return InputNotFoundError(what, "it does not exist", "correct data.shards")
    if isinstance(error, PermissionError) or (status is not None and 400 <= status < 500 and status not in _TEMPORARY):
        return _failure(error, shown)
    if isinstance(error, ImportError | ValueError):
        scheme = shown.partition(":")[0]
        reason = str(error) if isinstance(error, ImportError) else "fsspec does not know it"
        return UnavailableError(what, f"'{scheme}:' cannot be read: {reason}", "install what it needs")
    return None


def _failure(error: Exception, shown: str) -> StorageError:
    remedy = "check the address and your access rights"
    return StorageError(f"cannot fetch shard '{shown}'", _named(error), remedy)


def _is_masked(error: FileNotFoundError) -> bool:
    """Whether this stands for an unreachable or failing server: fsspec reports those of HTTP as missing files."""
    cause, status = error.__cause__, _status(error)
    if status is not None:
        return status not in (404, 410)
    return cause is not None and type(cause).__module__.partition(".")[0] == "aiohttp"


def _status(error: BaseException) -> int | None:
    """The HTTP status code behind an error, None if there is none."""
    for one in (error, error.__cause__):
        if isinstance(status := getattr(one, "status", None), int):
            return status
    return None


def _named(error: BaseException) -> str:
    """An error without its message, which may hold credentials."""
    if isinstance(error, _FetchingFailed):
        return str(error)
    status = _status(error)
    if status is not None:
        return f"the server answers {status}"
    cause = error.__cause__ if isinstance(error, FileNotFoundError) else None
    return type(cause or error).__name__


def _facts(info: dict[str, Any]) -> dict[str, Any]:
    """Size, time and tags of a remote file, as far as its file system reports them."""
    return {key: info[key] if key == "size" else str(info[key]) for key in _TAGS if info.get(key) is not None}


def _holds(place: Path, target: Path, facts: dict[str, Any] | None) -> bool:
    """Whether a shard is there, complete and with these facts of its server (None: any)."""
    try:
        known = json.loads(read_input(place / _FACTS))
        is_same = facts is None or known == facts
        return bool(is_same and target.stat().st_size == known.get("size", target.stat().st_size))
    except (OSError, LdmError, ValueError, AttributeError):
        return False
