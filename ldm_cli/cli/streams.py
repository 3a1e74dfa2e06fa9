"""stdout for results, stderr for all else; neither may break a run, and neither breaks silently."""

from __future__ import annotations

import io
import os
import sys
import warnings

from ldm_cli.errors import printable


def prepare() -> None:
    """Make both streams safe to write any text to.

    A descriptor that was closed by the caller would be given to the next file opened, and foreign bytes
    written into it; so it is opened on the null device first.
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
    """Write to stdout, complete or not at all as far as the caller can know.

    Raises:
        OSError: the reader went away (EPIPE), the disk is full, …
    """
    sys.stdout.write(text)
    sys.stdout.flush()


def write_line(line: str) -> None:
    """Write one line to stderr; a terminal that went away must not stop a run."""
    try:
        sys.stderr.write(printable(line) + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        pass


def abandon_stdout() -> None:
    """Throw away what stdout still holds, so that Python's last flush cannot fail once more."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)


def is_utf8() -> bool:
    """Whether stdout takes every character."""
    return (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
