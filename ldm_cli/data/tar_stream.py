"""One tar, read once from beginning to end: a file or named pipe, the output of a command, or what fsspec opens.

webdataset walks it; what it lets pass is noticed here: a missing end, compression, members too large to hold.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import IO

from ldm_cli.data.patterns import PIPE
from ldm_cli.data.tar_format import COMPRESSED
from ldm_cli.data.workers import SIGNALS, die_with_parent
from ldm_cli.errors import DataError, StorageError

_END = bytes(1024)
_CHUNK = 1 << 16
_MAGIC_LENGTH = max(map(len, COMPRESSED))


def members_of(address: str, shown: str, max_bytes: int) -> Iterator[tuple[str, bytes]]:
    """Name and content of each regular member.

    Args:
        address: a path, `pipe:COMMAND`, or what fsspec opens.
        shown: how it is called in messages.
        max_bytes: of a member.

    Raises:
        DataError: after the last whole member, if it is damaged.
        StorageError: it cannot be read, or the command failed.
    """
    from webdataset.tariterators import tar_file_iterator  # a slow import, needed for streams alone

    watched = None
    try:
        with _opened(address) as file:
            watched = _Watched(file, max_bytes)
            with closing(tar_file_iterator(watched)) as members:
                for member in members:
                    watched.unseen = 0
                    yield member["fname"], member["data"]
            watched.expect_end()
    except (tarfile.TarError, _Damage) as error:
        reason = str(error).partition(" @ ")[0].splitlines()[0]
        read = f"{watched.total} bytes were read" if watched else "nothing was read"
        remedy = "look at what it delivers, or set data.on_bad_shard=skip to use the whole samples before"
        raise DataError(f"shard '{shown}' is damaged", f"{reason}, {read}", remedy) from error
    except OSError as error:
        raise StorageError(f"cannot read shard '{shown}'", error.strerror or str(error)) from error


class _Damage(Exception):
    """A stream is not a whole tar."""


class _Watched:
    """A file that notices what a reader of tars does not: a missing end, compression, and members too large to hold.

    Attributes:
        total: bytes read.
        unseen: bytes read since this was last set to 0.
    """

    def __init__(self, file: IO[bytes], max_unseen: int) -> None:
        self.total = self.unseen = 0
        self._read = getattr(file, "read1", file.read)  # what is there at once, where a file can tell
        self._max_unseen = max_unseen
        self._head = self._tail = b""

    def read(self, size: int) -> bytes:
        """Some of the next bytes; none at the end."""
        data: bytes = self._read(min(size, _CHUNK))
        if self.total < _MAGIC_LENGTH:
            self._head += data
            for magic, name in COMPRESSED.items():
                if self._head.startswith(magic):
                    raise _Damage(f"compressed with {name}: shards are plain tars")
        self.total += len(data)
        self.unseen += len(data)
        if self.unseen > self._max_unseen + _CHUNK:
            raise _Damage(f"a member of more than data.max_member_bytes={self._max_unseen}")
        self._tail = (self._tail + data)[-len(_END) :]
        return data

    def expect_end(self) -> None:
        """The end-of-archive blocks were there, and nothing but zeros follows."""
        self.unseen = 0
        while data := self.read(_CHUNK):
            self.unseen = 0
            if any(data):
                raise _Damage("data behind the end of the archive")
        if self._tail != _END:
            raise _Damage("it ends without the end-of-archive blocks")


@contextmanager
def _opened(address: str) -> Iterator[IO[bytes]]:
    """A file, what a command writes, or what fsspec opens."""
    if address.startswith(PIPE):
        with _running(address.removeprefix(PIPE)) as output:
            yield output
    elif "://" in address:
        import fsspec  # as above

        with fsspec.open(address, "rb") as remote:
            yield remote
    else:
        with Path(address).open("rb") as file:
            yield file


@contextmanager
def _running(command: str) -> Iterator[IO[bytes]]:
    """The output of a shell command, which does not outlive us.

    Raises:
        OSError: it failed.
    """
    end, beginning = os.pipe()
    with os.fdopen(end, "rb") as output:
        try:
            process = subprocess.Popen(
                command, shell=True, stdin=subprocess.DEVNULL, stdout=beginning, preexec_fn=_prepare
            )
        finally:
            os.close(beginning)
        yield from _until_it_ends(process, output)


def _prepare() -> None:
    """In the process that becomes the command: what a worker ignores is the command's own affair again."""
    die_with_parent()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def _until_it_ends(process: subprocess.Popen[bytes], output: IO[bytes]) -> Iterator[IO[bytes]]:
    try:
        yield output
        _expect_success(process, None)
    except (tarfile.TarError, _Damage):
        with suppress(subprocess.TimeoutExpired):  # it may be what it did not write that is missing
            _expect_success(process, 1)
        raise
    finally:
        process.kill()
        process.wait()


def _expect_success(process: subprocess.Popen[bytes], timeout: float | None) -> None:
    if code := process.wait(timeout):
        raise OSError(f"the command ended with exit code {code}")
