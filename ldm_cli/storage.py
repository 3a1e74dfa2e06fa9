"""Files that are whole or not there, and what the user is told when writing them fails."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ldm_cli.errors import NOT_WRITABLE, LdmError, OutputError, StorageError

TEMPORARY_PREFIX = ".tmp-"
"""What begins like this is unfinished, and may be deleted by whoever owns the folder."""

_REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
}
_HOME = re.compile(r"~[\w.-]*(/.*)?", re.DOTALL)
# What file systems answer that cannot sync a folder.
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}


def expand_home(path: str) -> str:
    """`~/data` and `~name/data` with the home folder of the user in place of `~`; all other text stays.

    >>> expand_home("a ~/b"), expand_home("~100")
    ('a ~/b', '~100')
    """
    return os.path.expanduser(path) if _HOME.fullmatch(path) else path  # noqa: PTH111


def user_cache() -> Path:
    """`$XDG_CACHE_HOME/ldm` or `~/.cache/ldm`; in the system's temporary folder when the user has no home."""
    base = os.environ.get("XDG_CACHE_HOME")
    if not base:
        try:
            base = str(Path.home() / ".cache")
        except RuntimeError:
            base = str(Path(tempfile.gettempdir()) / f"ldm-{os.getuid()}")
    return Path(base) / "ldm"


def fsync_path(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk.

    Raises:
        OSError: that failed.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name to write to; on leaving, what is there is synced and takes the place of `path`.

    A reader sees the old file or the new one, nothing between; after a failure, the old one.

    Raises:
        OutputError, StorageError: as in `storage_errors`.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
    with storage_errors(path):
        try:
            yield temporary
            fsync_path(temporary)
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):  # what failed first is what should be reported
                temporary.unlink()
            raise


def write_whole(path: Path, text: str) -> None:
    """Replace `path` by a file that holds `text`, in UTF-8; errors as in `whole_file`."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def storage_errors(target: Path, num_bytes: int | None = None) -> Iterator[None]:
    """Turn what fails while writing `target` into an error that names it and the room left.

    Args:
        target: the file or folder; its parent is where it goes.
        num_bytes: how much it takes, if that is known; then errors of its parts become errors of the whole.

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


def error_number(error: BaseException) -> int | None:
    """The errno of an OSError, or of what safetensors or torch make of one; None: it is something else."""
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
        return OutputError(f"cannot write '{target}'", reason, "make the place writable, or choose another")
    sizes = [f"it takes {megabytes(num_bytes)}"] if num_bytes is not None else []
    with suppress(OSError):
        sizes.append(f"{megabytes(shutil.disk_usage(target.parent).free)} are free")
    cause = f"{reason} ({', '.join(sizes)})" if sizes else reason
    remedy = _REMEDIES.get(number, "look after the disk")
    return StorageError(f"cannot write '{target}'", cause, f"{remedy} and run the same command again")


def megabytes(num_bytes: int) -> str:
    """`12.3 MiB`.

    >>> megabytes(12_900_000)
    '12.3 MiB'
    """
    return f"{num_bytes / 2**20:.1f} MiB"
