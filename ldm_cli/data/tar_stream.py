"""One tar, read once from beginning to end: a file or named pipe, the output of a command, or what fsspec opens."""

from __future__ import annotations

import io
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ldm_cli.data.patterns import PIPE
from ldm_cli.data.tar_format import TarDamage, TarScan
from ldm_cli.data.workers import SIGNALS, die_with_parent
from ldm_cli.errors import DataError, StorageError


def members_of(address: str, shown: str, max_bytes: int) -> Iterator[tuple[bytes, bytes]]:
    """Name and content of each regular member.

    Args:
        address: a path, `pipe:COMMAND`, or what fsspec opens.
        shown: how it is called in messages.
        max_bytes: of a member.

    Raises:
        DataError: after the last whole member, if it is damaged.
        StorageError: it cannot be read, or the command failed.
    """
    try:
        with _opened(address) as file:
            scan = TarScan(file)
            for name, member in scan:
                if member.size > max_bytes:
                    raise TarDamage(member.offset, f"a member of more than data.max_member_bytes={max_bytes}")
                yield name, scan.read(member.size)  # if the stream ends within it, the scan raises next
    except TarDamage as error:
        remedy = "look at what it delivers, or set data.on_bad_shard=skip to use the whole samples before"
        raise DataError(f"shard '{shown}' is damaged", str(error), remedy) from error
    except OSError as error:
        raise StorageError(f"cannot read shard '{shown}'", error.strerror or str(error)) from error


@contextmanager
def _opened(address: str) -> Iterator[IO[bytes]]:
    """A file, what a command writes, or what fsspec opens."""
    if address.startswith(PIPE):
        with _running(address.removeprefix(PIPE)) as output:
            yield output
    elif "://" in address:
        import fsspec  # a slow import, needed for remote streams alone

        with fsspec.open(address, "rb") as remote:
            yield io.BufferedReader(remote)  # of some back ends a read gives less than was asked for
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
        try:
            yield output
            _expect_success(process, None)
        except TarDamage:
            with suppress(subprocess.TimeoutExpired):  # a command that failed did not write all
                _expect_success(process, 1)
            raise
        finally:
            process.kill()
            process.wait()


def _prepare() -> None:
    """Let the command handle signals by itself. It inherits from a worker that they are ignored."""
    die_with_parent()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def _expect_success(process: subprocess.Popen[bytes], timeout: float | None) -> None:
    if code := process.wait(timeout):
        raise OSError(f"the command ended with exit code {code}")
