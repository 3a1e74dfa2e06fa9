"""Every error that a user may see, and its exit code.

    LdmError                    70  a bug of ours
    ├── UsageError               2  wrong command line
    ├── DataError               65  data damaged, too many bad samples
    ├── InputNotFoundError      66  an input file or folder is missing
    ├── UnavailableError        69  device, compiler, backend or network missing
    ├── OutputError             73  output not writable, exists or locked
    ├── StorageError            74  I/O error, disk full
    ├── Preempted               75  checkpoint saved: run the same command again
    ├── RecipeError             78  recipe invalid
    ├── DivergedError           80  non-finite loss, gradient or weights
    ├── StuckError              80  fails at the same step run after run: do not requeue
    ├── OutOfMemoryError        81  the device's memory does not suffice
    ├── WorkerError             82  a rank or worker died
    └── CheckpointError         83  checkpoint or model corrupt, untrusted or of another kind

Misuse of a function by a programmer is a `ValueError` that names both values; the errors here are for users.
"""

from __future__ import annotations

import errno
import re
import unicodedata
from typing import ClassVar

_SECRET = re.compile(
    r"(^|[._-])(token|keys?|api_?key|password|passwd|passphrase|secrets?|credentials?|auth)([._-]|$)", re.IGNORECASE
)
_ASSIGNMENT = re.compile(r"([A-Za-z][\w.-]*)=(?!(?:value|VALUE)[,;.]?(?:[\s'\"]|$))([^\s'\"]+)")


def printable(text: str) -> str:
    """`text` with control characters and bidi overrides escaped, so that it is safe on a terminal or in a log.

    >>> printable("a\\x1b[31mb")
    'a\\\\x1b[31mb'
    """
    return "".join(
        c if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") else c.encode("unicode_escape").decode()
        for c in text
    )


def without_secrets(text: str) -> str:
    """`text` with `…` in place of what is assigned to a name like `token`, `key` or `password`.

    >>> without_secrets("override 'hub.token=abc'"), without_secrets("tokenizer.path=abc")
    ("override 'hub.token=…'", 'tokenizer.path=abc')
    >>> without_secrets("it is not KEY=VALUE; key=value-1")
    'it is not KEY=VALUE; key=…'
    """
    return _ASSIGNMENT.sub(lambda found: f"{found[1]}=…" if is_secret(found[1]) else found[0], text)


def is_secret(name: str) -> bool:
    """Whether a name is that of a secret: one of its words is `token`, `key`, `password` or the like."""
    return _SECRET.search(name) is not None


class LdmError(Exception):
    """A failure with its object, cause and remedy: one line for the user and one exit code.

    Attributes:
        what: the failure and its object, e.g. "cannot read shard 'a.tar'".
        cause: the reason, e.g. "ends inside member '000012.png' at byte 51200".
        remedy: an action for the user, e.g. "download it again, or set data.on_bad_shard=skip".
    """

    code: ClassVar[int] = 70
    tag: ClassVar[str] = "E-BUG"

    def __init__(self, what: str, cause: str = "", remedy: str = "") -> None:
        super().__init__(what)
        self.what, self.cause, self.remedy = what, cause, remedy

    def __str__(self) -> str:
        """The line without its prefix: `what: cause; remedy [E-TAG]`."""
        text = self.what + (f": {self.cause}" if self.cause else "") + (f"; {self.remedy}" if self.remedy else "")
        return f"{printable(without_secrets(text))} [{self.tag}]"


class UsageError(LdmError):
    """The command line is wrong."""

    code, tag = 2, "E-USAGE"


class DataError(LdmError):
    """Data is damaged, or too many samples are bad."""

    code, tag = 65, "E-DATA"


class InputNotFoundError(LdmError):
    """An input file or folder does not exist, or a pattern matches nothing."""

    code, tag = 66, "E-NOINPUT"


class UnavailableError(LdmError):
    """A device, a compiler, an optional backend or the network is missing."""

    code, tag = 69, "E-UNAVAILABLE"


class OutputError(LdmError):
    """The output cannot be written, exists already, or is locked by a live run."""

    code, tag = 73, "E-OUTPUT"


class StorageError(LdmError):
    """Reading or writing failed: disk full, quota, I/O error."""

    code, tag = 74, "E-IO"


class Preempted(LdmError):
    """The run was asked to stop and has saved a checkpoint; the same command continues it."""

    code, tag = 75, "E-PREEMPTED"


class RecipeError(LdmError):
    """The recipe is invalid. `problems` holds one `file:line:col: path: …` line each."""

    code, tag = 78, "E-RECIPE"

    def __init__(self, what: str, cause: str = "", remedy: str = "", problems: tuple[str, ...] = ()) -> None:
        super().__init__(what, cause, remedy)
        self.problems = problems


class DivergedError(LdmError):
    """Loss, gradient or weights are no longer finite."""

    code, tag = 80, "E-DIVERGED"


class StuckError(LdmError):
    """Every attempt fails at the same step; repeating the command is no use."""

    code, tag = 80, "E-STUCK"


class OutOfMemoryError(LdmError):
    """The memory of the device does not suffice."""

    code, tag = 81, "E-MEMORY"


class WorkerError(LdmError):
    """A rank or a data worker died."""

    code, tag = 82, "E-WORKER"


class CheckpointError(LdmError):
    """A checkpoint or model file is corrupt, untrusted, or of another kind or shape."""

    code, tag = 83, "E-CHECKPOINT"


NOT_WRITABLE = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}
)
"""Values of errno that mean: this place cannot be written to."""
NOT_READABLE = frozenset(
    {errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO, errno.ENODEV}
)
"""Values of errno that mean: this file cannot be opened, whatever the disk does."""


def as_ldm_error(error: BaseException) -> LdmError | None:
    """The error to report for an exception of Python or torch; None if it is a bug of ours."""
    if isinstance(error, LdmError):
        return error
    if _is_out_of_memory(error):
        remedy = "use a smaller train.micro_batch, a smaller batch_size, or smaller sizes"
        return OutOfMemoryError("out of memory", _memory_asked_for(error), remedy)
    if isinstance(error, OSError) and error.errno is not None:
        return _storage_error(error)
    if type(error).__module__ in ("torch._dynamo.exc", "torch._inductor.exc"):
        remedy = "it needs a C++ compiler, and triton on a GPU: install them, or set compile=false"
        return UnavailableError("torch cannot compile the model", first_line(error), remedy)
    return None


def first_line(error: BaseException) -> str:
    """The first line of an exception's text."""
    return next(iter(str(error).splitlines()), "")


def amount(num_bytes: float) -> str:
    """A number of bytes in a readable unit.

    >>> amount(1_514_000_000)
    '1.41 GiB'
    """
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if num_bytes < 1024 or unit == "TiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:.4g} {unit}"


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)


def _memory_asked_for(error: BaseException) -> str:
    """The size of the failed allocation, or else the first line of the library's message."""
    found = re.search(r"tried to allocate (\d+) bytes", str(error))
    return f"tried to allocate {amount(int(found[1]))}" if found else first_line(error)


def _storage_error(error: OSError) -> LdmError:
    name = f" '{error.filename}'" if error.filename is not None else ""
    reason = (error.strerror or str(error)).lower()
    if error.errno == errno.ENOENT:
        return InputNotFoundError(f"cannot open{name}", reason)
    if error.errno in NOT_WRITABLE:
        return OutputError(f"cannot open{name}", reason)
    return StorageError(f"cannot read or write{name}", reason)
