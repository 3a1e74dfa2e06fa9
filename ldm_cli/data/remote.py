"""Remote shards: what their servers say of them, and their bytes; from the web, and through fsspec from elsewhere.

User, password and query of an address are never shown or stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import IO, Any
from urllib.parse import unquote, urldefrag, urlsplit, urlunsplit

from ldm_cli.errors import InputNotFoundError, LdmError, StorageError, UnavailableError

CHUNK = 1 << 22
_TAGS = ("size", "ETag", "etag", "LastModified", "last_modified", "mtime", "md5Hash", "created")
_HEADERS = ("Content-Length", "ETag", "Last-Modified")
_TEMPORARY = {408, 425, 429}
"""HTTP status codes below 500 that may not recur."""
_READ_TIMEOUT = 60
"""Seconds without data after which an attempt fails; the whole shard may take longer."""


def without_credentials(url: str) -> str:
    """The address for messages: without user, password, query and fragment."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def name_of(url: str) -> str:
    """What tells a shard from others: shards may differ in the query alone; user and password do not matter."""
    return without_credentials(url) + "?" + urlsplit(urldefrag(url)[0]).query


class FetchingFailed(Exception):
    """Reading from the server failed, or gave another number of bytes than announced."""


def server_facts(url: str) -> dict[str, Any]:
    """Size, time and tags of a remote file, as far as its server reports them; raises what the back end raises."""
    if _is_web(url):
        with _answer(url, "HEAD") as answer:
            found = {name: answer.headers[name] for name in _HEADERS if answer.headers[name] is not None}
        length = str(found.pop("Content-Length", ""))
        return found | ({"size": int(length)} if length.isdigit() else {})
    system, path = _system(url)
    info = system.info(path)
    return {key: info[key] if key == "size" else str(info[key]) for key in _TAGS if info.get(key) is not None}


def server_stamp(facts: dict[str, Any]) -> tuple[int, int, int]:
    """The stamp of a remote shard: its size (-1: not announced), and 126 bits of a hash of all facts."""
    digest = hashlib.sha256(repr(sorted(facts.items())).encode()).digest()
    first, second = (int.from_bytes(digest[start : start + 8], "little") >> 1 for start in (0, 8))
    return int(facts.get("size", -1)), first, second


def chunks_of(url: str) -> Iterator[bytes]:
    """The bytes of a remote file; raises `FetchingFailed`, or what the back end raises before the first byte."""
    if _is_web(url):
        opened = _answer(url, "GET")
    else:
        system, path = _system(url)
        opened = system.open(path, "rb")
    with opened as source:
        while chunk := _read(source):
            yield chunk


def _is_web(url: str) -> bool:
    """Whether Python's own library fetches it: fsspec hides how a web server has failed, and needs a package more."""
    return urlsplit(url).scheme.lower() in ("http", "https")


def _answer(url: str, method: str) -> Any:
    """The answer of a web server.

    Raises:
        HTTPError: it is none of success.
        OSError: there is none.
    """
    from base64 import b64encode
    from urllib.request import Request, urlopen  # slow imports, needed for remote shards alone

    parts = urlsplit(urldefrag(url)[0])
    request = Request(urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])), method=method)
    if parts.username is not None:
        secret = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        request.add_header("Authorization", "Basic " + b64encode(secret.encode()).decode())
    return urlopen(request, timeout=_READ_TIMEOUT)


def _system(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs  # a slow import, needed for remote shards alone

    system, path = url_to_fs(url)
    return system, path


def _read(source: IO[bytes]) -> bytes:
    """The next bytes; errors of the server get their own class, apart from those of the local disk."""
    try:
        return source.read(CHUNK)
    except Exception as error:
        raise FetchingFailed(named(error)) from error


def permanent_error(error: Exception, shown: str) -> LdmError | None:
    """An error of a server or a back end as ours, None if a new attempt may succeed. Its message may hold credentials,
    and is not repeated."""
    what, status = f"cannot fetch shard '{shown}'", _status(error)
    if status in (404, 410) or (isinstance(error, FileNotFoundError) and status is None):
        return InputNotFoundError(what, "it does not exist", "correct data.shards")
    if isinstance(error, PermissionError) or (status is not None and 400 <= status < 500 and status not in _TEMPORARY):
        return StorageError(what, named(error), "check the address and your access rights")
    if isinstance(error, ImportError | ValueError):
        scheme = shown.partition(":")[0]
        reason = str(error) if isinstance(error, ImportError) else "fsspec does not know it"
        return UnavailableError(what, f"'{scheme}:' cannot be read: {reason}", "install what it needs")
    return None


def _status(error: BaseException) -> int | None:
    """The HTTP status code behind an error, None if there is none."""
    for one in (error, error.__cause__):
        if isinstance(status := getattr(one, "status", None), int):
            return status
    return None


def named(error: BaseException) -> str:
    """An error without its message, which may hold credentials."""
    if isinstance(error, FetchingFailed):
        return str(error)
    status = _status(error)
    if status is not None:
        return f"the server answers {status}"
    cause = error.__cause__ if isinstance(error, FileNotFoundError) else None
    return type(cause or error).__name__
