"""Input files: opened without waiting, regular files only, and read within limits."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm_cli.errors import NOT_READABLE, DataError, InputNotFoundError, LdmError, StorageError, amount

MOST_BYTES = 2**24
"""Largest file of settings or text that is read whole, unless its reader says otherwise."""

MOST_PICTURE_BYTES = 2**28
"""Largest picture, or list of pictures, that is read whole."""

_CHUNK = 2**16

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
    stat.S_IFSOCK: "a socket",
}


@contextmanager
def input_errors(path: Path, remedy: str = "") -> Iterator[None]:
    """Turn failures while reading `path` into errors that name it.

    Raises:
        InputNotFoundError: there is no such file, or it may not be read.
        StorageError: the device fails.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise InputNotFoundError(f"'{path}' not found", remedy=remedy) from error
        if error.errno in NOT_READABLE:
            raise InputNotFoundError(f"cannot read '{path}'", reason, remedy) from error
        raise StorageError(f"cannot read '{path}'", reason) from error
    except ValueError as error:  # a NUL in the name
        raise InputNotFoundError(f"cannot read '{path}'", str(error), remedy) from error


def open_input(path: Path, *, remedy: str = "", follow: bool = True) -> io.BufferedReader:
    """A regular file, open for reading; a FIFO or device is refused before a byte of it is waited for.

    Args:
        remedy: of the error.
        follow: whether `path` may be a link.

    Raises:
        InputNotFoundError, StorageError: as in `input_errors`; or it is no regular file.
    """
    with input_errors(path, remedy):
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
        descriptor = os.open(path, flags)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = _KINDS.get(stat.S_IFMT(mode), "of another kind")
        raise InputNotFoundError(f"cannot read '{path}'", f"it is {kind}, no regular file", remedy)
    return io.BufferedReader(io.FileIO(descriptor))


def read_input(
    path: Path,
    most_bytes: int = MOST_BYTES,
    *,
    too_large: type[LdmError] = DataError,
    remedy: str = "",
    follow: bool = True,
) -> bytes:
    """The content of a regular file.

    Args:
        most_bytes: largest size that is read.
        too_large: the error for a larger one.
        remedy, follow: as in `open_input`.

    Raises:
        LdmError: as in `open_input`, and `too_large`.
    """
    with open_input(path, remedy=remedy, follow=follow) as stream:
        if (size := os.fstat(stream.fileno()).st_size) > most_bytes:
            raise too_large(
                f"cannot read '{path}'", f"{amount(size)} are more than the {amount(most_bytes)} it may have"
            )
        with input_errors(path, remedy):
            content = stream.read(size)  # a limit as argument would be allocated
            while more := stream.read(_CHUNK):  # the file grows, or says that it has no bytes, as those of /proc do
                content += more
                if len(content) > most_bytes:
                    raise too_large(f"cannot read '{path}'", f"it has more than the {amount(most_bytes)} it may have")
        return content
