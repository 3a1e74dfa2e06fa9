"""Files that are complete or absent, and the errors for failed writes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ldm_cli.errors import NOT_WRITABLE, InputNotFoundError, LdmError, OutputError, StorageError, amount
from ldm_cli.inputs import read_input

TEMPORARY_PREFIX = ".tmp-"
"""Prefix of unfinished files and folders; the owner of their folder may delete them."""

_REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
}
_HOME = re.compile(r"~[\w.-]*(/.*)?", re.DOTALL)
# Errors of file systems that cannot sync a folder.
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}


def expand_home(path: str) -> str:
    """`~/data` and `~name/data` with the home folder of the user in place of `~`; all other text stays.

    >>> expand_home("a ~/b"), expand_home("~100")
    ('a ~/b', '~100')
    """
    return os.path.expanduser(path) if _HOME.fullmatch(path) else path  # noqa: PTH111


def user_cache() -> Path:
    """`$XDG_CACHE_HOME/ldm` or `~/.cache/ldm`; in the system's temporary folder when the user has no home."""
    base = expand_home(os.environ.get("XDG_CACHE_HOME", ""))
    if not base:
        try:
            base = str(Path.home() / ".cache")
        except RuntimeError:
            base = str(Path(tempfile.gettempdir()) / f"ldm-{os.getuid()}")
    return Path(base) / "ldm"


def resolve_model_folder(path: Path) -> Path:
    """The folder or file that the path of a model means: itself, or in the Hugging Face cache the snapshot of `main`.

    The root of a cached model is `models--ORG--NAME`, with `refs/main` and `snapshots/COMMIT`. Without that file, its
    only snapshot is taken.

    Raises:
        InputNotFoundError: the path is the root of a cached model without that snapshot.
    """
    if not (path / "snapshots").is_dir():
        return path
    main, snapshots = path / "refs" / "main", sorted((path / "snapshots").iterdir())
    cause = f"{len(snapshots)} snapshots and no refs/main"
    if main.is_file():
        commit = read_input(main).decode("utf-8", "replace").strip()
        snapshots, cause = [p for p in snapshots if p.name == commit], f"refs/main names {commit!r}"
    if len(snapshots) != 1:
        raise InputNotFoundError(f"no snapshot to use in '{path}'", cause, "give one of the folders in snapshots/")
    return snapshots[0]


def fsync_path(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk.

    Raises:
        OSError: the flush failed.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file.

    Raises:
        OSError: reading failed.
    """
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def open_output(path: Path, flags: int) -> int:
    """Descriptor of a regular file that is written in place, and made where needed; a link is never followed.

    Args:
        flags: of `os.open`.

    Raises:
        OutputError: it is a link, a device or a FIFO, or cannot be written.
        StorageError: as in `storage_errors`.
    """
    remedy = "remove it, or choose another place"
    with storage_errors(path):
        try:
            own = os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            descriptor = os.open(path, flags | own, 0o666)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENXIO):
                raise
            kind = "a link" if error.errno == errno.ELOOP else "a FIFO"
            raise OutputError(f"cannot write '{path}'", f"it is {kind}, no regular file", remedy) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OutputError(f"cannot write '{path}'", "it is no regular file", remedy)
    return descriptor


def append_text(path: Path, text: str) -> None:
    """Add `text` at the end of a file, in UTF-8; errors as in `open_output`."""
    with storage_errors(path), os.fdopen(open_output(path, os.O_WRONLY | os.O_APPEND), "a", encoding="utf-8") as stream:
        stream.write(text)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name to write to. On leaving, that file is synced and replaces `path`.

    A reader sees the old file or the new one, never a part; after a failure, the old one.

    Raises:
        OutputError, StorageError: as in `storage_errors`.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
    with storage_errors(path):
        temporary.unlink(missing_ok=True)  # it may be a link to another file
        try:
            yield temporary
            fsync_path(temporary)
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):  # the first failure is the one to report
                temporary.unlink()
            raise


def write_whole(path: Path, text: str) -> None:
    """Replace `path` by a file that holds `text`, in UTF-8; errors as in `whole_file`."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """JSON data with its own hash as the entry `sha256`, by which damage is noticed."""
    return {**content, "sha256": _json_sha256(content)}


def is_sealed(content: Mapping[str, Any]) -> bool:
    """Whether JSON data is as `sealed` made it."""
    return content.get("sha256") == _json_sha256({name: v for name, v in content.items() if name != "sha256"})


def _json_sha256(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextmanager
def storage_errors(target: Path, num_bytes: int | None = None) -> Iterator[None]:
    """Turn failures while writing `target` into an error that names it and the free space.

    Args:
        target: the file or folder to write.
        num_bytes: its size, if that is known; then errors of its parts become errors of the whole.

    Raises:
        OutputError: the place cannot be written to.
        StorageError: the disk is full, the quota used up, or the device fails.
    """
    try:
        yield
    except LdmError as error:
        source = error.__cause__ if num_bytes is not None and isinstance(error, StorageError) else None
        number = None if source is None else error_number(source)
        if number is None:
            raise
        raise _as_ldm_error(number, target, num_bytes) from source
    except Exception as error:
        number = error_number(error)
        if number is None:
            raise
        raise _as_ldm_error(number, target, num_bytes) from error


def expect_room(folder: Path, num_bytes: int, what: str, or_else: str = "") -> None:
    """Make sure that a folder's disk has room for `num_bytes` more bytes of `what`.

    Raises:
        StorageError: it has less; `or_else` completes the remedy "free some space".
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        cause = f"it takes {amount(num_bytes)}, and {amount(free)} are free"
        remedy = f"free some space{or_else or ' and run the same command again'}"
        raise StorageError(f"no room for {what} in '{folder}'", cause, remedy)


def error_number(error: BaseException) -> int | None:
    """The errno of an OSError, or of an error that safetensors or torch made of one; None for all others."""
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    found = None
    if type(error).__name__ == "SafetensorError":
        found = re.search(r"\(os error (\d+)\)", str(error))
    elif isinstance(error, RuntimeError):
        found = re.match(r"unable to (?:open|mmap|stat|resize)\b.*: [^:]* \((\d+)\)$", str(error))
    return int(found[1]) if found else None


def _as_ldm_error(number: int, target: Path, num_bytes: int | None) -> LdmError:
    reason = os.strerror(number)
    if number in NOT_WRITABLE:
        return OutputError(f"cannot write '{target}'", reason, "make it writable, or choose another place")
    sizes = [f"it takes {amount(num_bytes)}"] if num_bytes is not None else []
    with suppress(OSError):
        sizes.append(f"{amount(shutil.disk_usage(target.parent).free)} are free")
    cause = f"{reason} ({', '.join(sizes)})" if sizes else reason
    remedy = _REMEDIES.get(number, "check the disk")
    return StorageError(f"cannot write '{target}'", cause, f"{remedy} and run the same command again")
