"""The lock of a run folder, which also says in which step its owner is."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ldm_cli.errors import OutputError, printable
from ldm_cli.storage import open_output

_LENGTH = 4096
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL}


class RunLock:
    """`.lock`: locked by the process that owns the folder, with its name as text: `pid 12 on host, in step 34`.

    The system releases the lock of a process that dies. Its text stays and says in which step it died.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._descriptor: int | None = None
        self._owner = f"pid {os.getpid()} on {socket.gethostname()}"

    def acquire(self, warn: Callable[[str], None]) -> int | None:
        """Take the folder; returns the step in which its last owner died, if it died in one.

        Raises:
            OutputError: a live process owns the folder, or the file cannot be made.
        """
        descriptor = open_output(self.file, os.O_RDWR)
        before = os.pread(descriptor, _LENGTH, 0).decode("utf-8", "replace").strip()
        try:
            # Not flock: data workers would inherit it, and hold it for seconds after a kill of their owner.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS or _is_running_here(before):
                os.close(descriptor)
                raise OutputError(
                    f"'{self.file.parent}' is in use",
                    f"by {printable(before) or 'another process'}",
                    "wait for it, stop it, or choose another --out",
                ) from error
            warn(f"'{self.file.parent}' lies on a file system without locks: make sure that no other run uses it")
        self._descriptor = descriptor
        died_in = re.search(r", in step (\d+)$", before)
        self.note(None)
        return int(died_in[1]) if died_in else None

    @property
    def is_held(self) -> bool:
        """Whether this process owns the folder."""
        return self._descriptor is not None

    def note(self, step: int | None) -> None:
        """Write down which step is being computed; None: no step."""
        if self._descriptor is not None:
            text = self._owner + ("" if step is None else f", in step {step}") + "\n"
            with suppress(OSError):  # information only
                # The longer text is written before the file is cut: a kill between leaves the old or the new line.
                os.ftruncate(self._descriptor, os.pwrite(self._descriptor, text.encode(), 0))

    def release(self) -> None:
        """Release the lock."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _is_running_here(owner: str) -> bool:
    """Whether the owner's process is alive, as far as this machine knows."""
    found = re.match(r"pid (\d+) on (\S+?)(,|$)", owner)
    if not found or found[2] != socket.gethostname():
        return False
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
