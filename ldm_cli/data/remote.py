"""Remote shards: fetched whole through fsspec into a bounded folder of the cache, then read like local ones.

A shard is known by its address without user, password and query, which are never shown or stored; it is fetched
again when the size, time or tag that its server tells has changed. Shards that were not used for longest give
way to new ones.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from ldm_cli.data.index_cache import cache_folder
from ldm_cli.errors import InputNotFoundError, LdmError, StorageError, UnavailableError
from ldm_cli.reporting import Reporter
from ldm_cli.storage import whole_file, write_whole

_FACTS = "facts.json"
_CHUNK = 1 << 22
_TAGS = ("size", "ETag", "etag", "LastModified", "last_modified", "mtime", "md5Hash", "created")


def without_credentials(url: str) -> str:
    """The address as it may be shown: without user, password, query and fragment."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


class StagingArea:
    """The folder that remote shards are fetched into.

    Args:
        max_bytes: of all shards in it.
        reporter: told about what is fetched.
    """

    def __init__(self, max_bytes: int, reporter: Reporter) -> None:
        self._folder = cache_folder().parent / "shards"
        self._max_bytes, self._reporter = max_bytes, reporter
        self._used: set[Path] = set()

    def fetch(self, url: str) -> Path:
        """The local file with the shard at `url`, fetched unless it is there and unchanged.

        Raises:
            InputNotFoundError: there is no such shard.
            UnavailableError: what its scheme needs is not installed.
            StorageError: it could not be fetched, or the shards of one data set exceed the bound.
        """
        shown = without_credentials(url)
        place = self._folder / hashlib.sha256(shown.encode()).hexdigest()[:32]
        target = place / Path(urlsplit(shown).path).name
        with self._locked(), _told(shown):
            from fsspec.core import url_to_fs  # a slow import, needed for remote shards alone

            system, path = url_to_fs(url)
            facts = _facts(system.info(path))
            self._used.add(place)
            if not _holds(place, target, facts):
                shutil.rmtree(place, ignore_errors=True)
                self._make_room(int(facts.get("size") or 0), shown)
                place.mkdir(parents=True)
                self._reporter.info(f"fetching '{shown}'")
                with whole_file(target) as partial, system.open(path, "rb") as source, partial.open("wb") as file:
                    shutil.copyfileobj(source, file, _CHUNK)
                if target.stat().st_size != facts.get("size", target.stat().st_size):
                    raise StorageError(
                        f"cannot fetch shard '{shown}'",
                        f"{target.stat().st_size} bytes came, {facts['size']} were announced",
                    )
                write_whole(place / _FACTS, json.dumps(facts))
            os.utime(place)
        return target

    def _make_room(self, size: int, shown: str) -> None:
        """Remove what was not used for longest until `size` more bytes fit."""
        places = sorted((p for p in self._folder.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime_ns)
        held = {p: sum(file.stat().st_size for file in p.iterdir()) for p in places}
        for place in places:
            if sum(held.values()) + size <= self._max_bytes:
                return
            if place not in self._used:
                shutil.rmtree(place)
                del held[place]
        if sum(held.values()) + size > self._max_bytes:
            raise StorageError(
                f"cannot fetch shard '{shown}' of {size} bytes",
                f"the data set has {sum(held.values())} bytes already, data.max_fetched_bytes={self._max_bytes}",
                "raise it, or copy the shards to a local folder",
            )

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


@contextmanager
def _told(shown: str) -> Iterator[None]:
    """Errors of fsspec and its back ends as ours; their own words may hold credentials, and are not repeated."""
    what = f"cannot fetch shard '{shown}'"
    try:
        yield
    except LdmError:
        raise
    except FileNotFoundError:
        raise InputNotFoundError(what, "it does not exist", "correct data.shards") from None
    except (ImportError, ValueError) as error:
        scheme = shown.partition(":")[0]
        reason = str(error) if isinstance(error, ImportError) else "fsspec does not know it"
        raise UnavailableError(what, f"'{scheme}:' cannot be read: {reason}", "install what it needs") from None
    except Exception as error:
        raise StorageError(what, type(error).__name__, "see whether the address and your access are right") from None


def _facts(info: dict[str, Any]) -> dict[str, Any]:
    """What tells one content of a remote file from another, as far as its system says."""
    return {key: info[key] if key == "size" else str(info[key]) for key in _TAGS if info.get(key) is not None}


def _holds(place: Path, target: Path, facts: dict[str, Any]) -> bool:
    try:
        known = json.loads((place / _FACTS).read_bytes())
        return bool(known == facts and target.stat().st_size == facts.get("size", target.stat().st_size))
    except (OSError, ValueError):
        return False
