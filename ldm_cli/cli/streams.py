"""stdout for results, stderr for everything else."""

from __future__ import annotations

import io
import os
import sys
import warnings

from ldm_cli.errors import printable


def prepare() -> None:
    """Make both streams safe for any text.

    If the caller has closed a descriptor, the next opened file would get its number and receive our output. So it is
    opened on the null device first.
    """
    for descriptor, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
            mode = "r" if descriptor == 0 else "w"
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def silence_library_warnings() -> None:
    """Keep the warnings of libraries off the terminal, unless the user asked Python for them."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def write_result(text: str) -> None:
    """Write to stdout and flush it.

    Raises:
        OSError: the reader has closed the pipe (EPIPE), the disk is full, …
    """
    sys.stdout.write(text)
    sys.stdout.flush()


def write_line(line: str) -> None:
    """Write one line to stderr; a closed terminal must not stop a run."""
    try:
        sys.stderr.write(printable(line) + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        pass


def abandon_stdout() -> None:
    """Discard the buffer of stdout, so that Python's last flush cannot fail again."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)


def is_utf8() -> bool:
    """Whether stdout can encode every character."""
    return (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
