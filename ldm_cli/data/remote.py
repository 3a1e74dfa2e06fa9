"""Remote shards: fetched whole through fsspec into a bounded folder of the cache, then read like local ones.

User, password and query of an address are never shown or stored. A shard is fetched again when the size, time or tag
that its server tells has changed. Shards that were not used for longest give way to new ones, but never those of a
data set that is open, here or in another process.
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
from ldm_cli.reporting import Reporter
from ldm_cli.storage import storage_errors, user_cache, whole_file, write_whole

_FACTS = "facts.json"
_LEASE = ".lease-"
_CHUNK = 1 << 22
_TAGS = ("size", "ETag", "etag", "LastModified", "last_modified", "mtime", "md5Hash", "created")
_PAUSES = (0.5, 2.0, 8.0)
"""Seconds before the second, third and fourth attempt."""
_MAY_PASS = {408, 425, 429}
"""Answers of HTTP below 500 after which the same question may be answered otherwise."""
_SECONDS_WITHOUT_NEWS = 60
"""Of an HTTP server, after which an attempt is given up, however long the whole shard takes."""


def without_credentials(url: str) -> str:
    """The address as it may be shown: without user, password, query and fragment."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def forget_fetched(file: Path) -> None:
    """Let the next start fetch a shard again, if it is a fetched one: what came was not sound."""
    if file.parent.parent == _folder():
        with suppress(OSError):
            (file.parent / _FACTS).unlink()


def _folder() -> Path:
    return user_cache() / "shards"


class _FetchingFailed(Exception):
    """Reading from the other side failed, or gave another number of bytes than was announced."""


class StagingArea:
    """The folder that remote shards are fetched into. What this object fetched stays there for as long as it lives.

    Args:
        max_bytes: of all shards in the folder.
        reporter: told about what is fetched, and about what is tried again.
    """

    def __init__(self, max_bytes: int, reporter: Reporter) -> None:
        self._folder = _folder()
        self._max_bytes, self._reporter = max_bytes, reporter
        self._lease: IO[str] | None = None
        self._is_out_of_reach = False

    def fetch(self, url: str) -> Path:
        """The local file with the shard at `url`, fetched unless it is there and unchanged; what may pass is tried
        four times.

        Raises:
            InputNotFoundError: there is no such shard.
            UnavailableError: what its scheme needs is not installed.
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
                lasting = _lasting(error, shown)
                if lasting is not None:
                    raise lasting from None
                if pause is None:
                    self._is_out_of_reach = True
                    return self._fetched_before(url, shown, error)
                self._reporter.warn(f"fetching '{shown}' failed ({_named(error)}): once more in {pause:g} s")
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
        # The query may be what tells one shard from another; user and password are not.
        address = shown + "?" + urlsplit(urldefrag(url)[0]).query
        place = self._folder / hashlib.sha256(address.encode()).hexdigest()[:32]
        return place, place / (Path(urlsplit(shown).path).name or "shard")

    def _fetched_before(self, url: str, shown: str, error: Exception) -> Path:
        """What is here of a shard whose server cannot be asked whether it has changed; a run that goes on compares
        the fingerprint of its data.

        Raises:
            StorageError: nothing is here.
        """
        place, target = self._place(url, shown)
        with self._locked():
            if not _holds(place, target, None):
                raise _failure(error, shown) from None
            self._hold(place)
        self._reporter.warn(
            f"cannot ask whether '{shown}' has changed ({_named(error)}): using what was fetched before"
        )
        return target

    def _copy(self, source: IO[bytes], file: IO[bytes], announced: int | None, place: Path, shown: str) -> None:
        """Copy as many bytes as are announced, and make room for them, before they come if that is known."""
        room, done = announced or 0, 0
        self._make_room(room, place, shown)
        while chunk := _read(source):
            done += len(chunk)
            if done > room:
                room = done + _CHUNK
                self._make_room(room, place, shown)
            file.write(chunk)
        if announced is not None and done != announced:
            raise _FetchingFailed(f"{done} bytes came, {announced} were announced")

    def _make_room(self, size: int, place: Path, shown: str) -> None:
        """Remove what was not used for longest until `size` bytes in `place` fit; what is in use stays."""
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
                "raise it, or read them as they come by data.stream=true",
            )

    def _hold(self, place: Path) -> None:
        """Note that this object's owner, or a process forked from it, may read what is in `place`."""
        with storage_errors(place):
            if self._lease is None:
                descriptor, _ = tempfile.mkstemp(prefix=_LEASE, dir=self._folder)
                self._lease = os.fdopen(descriptor, "w")
                fcntl.flock(self._lease, fcntl.LOCK_EX)  # until the last process that has it open is gone
            self._lease.write(f"{place.name}\n")
            self._lease.flush()

    def _in_use(self) -> set[str]:
        """Names of the places that living processes hold; the notes of dead ones are cleared away."""
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
            lock = (self._folder / ".lock").open("w")
        except OSError as error:
            raise StorageError(f"cannot write '{self._folder}'", error.strerror or str(error)) from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _last_use(place: Path) -> int:
    return place.stat().st_mtime_ns


def _options(url: str) -> dict[str, Any]:
    """What the back end is told: a large shard may take its time, silence may not."""
    if urlsplit(url).scheme.lower() not in ("http", "https"):
        return {}
    news = importlib.import_module("aiohttp").ClientTimeout(
        total=None, sock_connect=_SECONDS_WITHOUT_NEWS, sock_read=_SECONDS_WITHOUT_NEWS
    )
    return {"client_kwargs": {"timeout": news}}


def _read(source: IO[bytes]) -> bytes:
    """The next bytes; errors of the other side are told from those of the disk that is written to."""
    try:
        return source.read(_CHUNK)
    except Exception as error:
        raise _FetchingFailed(_named(error)) from error


def _lasting(error: Exception, shown: str) -> LdmError | None:
    """An error of fsspec or a back end as ours, if trying again is no use; its own words may hold credentials, and are
    not repeated."""
    what, status = f"cannot fetch shard '{shown}'", _status(error)
    if isinstance(error, FileNotFoundError) and not _is_masked(error):
        return InputNotFoundError(what, "it does not exist", "correct data.shards")
    if isinstance(error, PermissionError) or (status is not None and 400 <= status < 500 and status not in _MAY_PASS):
        return _failure(error, shown)
    if isinstance(error, ImportError | ValueError):
        scheme = shown.partition(":")[0]
        reason = str(error) if isinstance(error, ImportError) else "fsspec does not know it"
        return UnavailableError(what, f"'{scheme}:' cannot be read: {reason}", "install what it needs")
    return None


def _failure(error: Exception, shown: str) -> StorageError:
    remedy = "see whether the address and your access are right"
    return StorageError(f"cannot fetch shard '{shown}'", _named(error), remedy)


def _is_masked(error: FileNotFoundError) -> bool:
    """Whether a server that could not be reached, or failed, is called a missing file, as fsspec does for HTTP."""
    cause, status = error.__cause__, _status(error)
    if status is not None:
        return status not in (404, 410)
    return cause is not None and type(cause).__module__.partition(".")[0] == "aiohttp"


def _status(error: BaseException) -> int | None:
    """The answer of an HTTP server that led to an error."""
    for one in (error, error.__cause__):
        if isinstance(status := getattr(one, "status", None), int):
            return status
    return None


def _named(error: BaseException) -> str:
    """An error without its words."""
    if isinstance(error, _FetchingFailed):
        return str(error)
    status = _status(error)
    if status is not None:
        return f"the server answers {status}"
    cause = error.__cause__ if isinstance(error, FileNotFoundError) else None
    return type(cause or error).__name__


def _facts(info: dict[str, Any]) -> dict[str, Any]:
    """What tells one content of a remote file from another, as far as its system says."""
    return {key: info[key] if key == "size" else str(info[key]) for key in _TAGS if info.get(key) is not None}


def _holds(place: Path, target: Path, facts: dict[str, Any] | None) -> bool:
    """Whether a shard is there, whole and as its server tells (None: whatever that may be)."""
    try:
        known = json.loads((place / _FACTS).read_bytes())
        is_same = facts is None or known == facts
        return bool(is_same and target.stat().st_size == known.get("size", target.stat().st_size))
    except (OSError, ValueError):
        return False
