"""Files of named columns in the user's cache: safetensors that are mapped into memory and read as they are needed."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

Columns = Mapping[str, Any]
"""Name → an object with a buffer: bytes, array, or tensor's bytes."""


def read_columns(file: Path) -> tuple[dict[str, memoryview], dict[str, Any]] | None:
    """The columns of a file, mapped, and its facts; None if there is no such file, or a damaged one."""
    found = _opened(file)
    if found is None:
        return None
    columns, facts = found
    return (columns, facts) if facts.pop("digest", None) == _digest(columns) else None


def read_facts(file: Path) -> dict[str, Any] | None:
    """The facts of a file alone, in time that does not depend on its size."""
    found = _opened(file)
    return None if found is None else found[1]


def write_columns(file: Path, columns: Columns, facts: Mapping[str, Any]) -> None:
    """Replace a file of the cache; other processes see the old file or the new one, never a part.

    Raises:
        OSError: the folder cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".tmp-{os.getpid()}")
    held = {name: bytearray(column) for name, column in columns.items()}
    text = json.dumps({**facts, "digest": _digest(held)})
    tensors = {name: torch.frombuffer(c, dtype=torch.uint8) if c else torch.empty(0) for name, c in held.items()}
    try:
        save_file(tensors, temporary, {"facts": text, "sha256": hashlib.sha256(text.encode()).hexdigest()})
        temporary.replace(file)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _opened(file: Path) -> tuple[dict[str, memoryview], dict[str, Any]] | None:
    try:
        mapped = _mapped(file)
        start = 8 + int.from_bytes(mapped[:8], "little")
        header = json.loads(bytes(mapped[8:start]))
        metadata = header.pop("__metadata__")
        if metadata["sha256"] != hashlib.sha256(metadata["facts"].encode()).hexdigest():
            return None
        ranges = {name: described["data_offsets"] for name, described in header.items()}
        columns = {name: mapped[start + first : start + end] for name, (first, end) in ranges.items()}
        return columns, json.loads(metadata["facts"])
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None


def _mapped(file: Path) -> memoryview:
    """The bytes of a file, mapped without a descriptor, which Python's mmap would keep."""
    if not file.is_file():  # a FIFO would be waited for
        raise OSError(f"'{file}' is no regular file")
    size = file.stat().st_size
    storage = torch.UntypedStorage.from_file(str(file), False, size)
    array = (ctypes.c_ubyte * size).from_address(storage.data_ptr())
    array.storage = storage  # type: ignore[attr-defined]  # kept as long as any view of it
    return memoryview(array).cast("B")


def _digest(columns: Mapping[str, bytearray] | Mapping[str, memoryview]) -> str:
    digest = hashlib.sha256()
    for name in sorted(columns):
        digest.update(f"{name} {len(columns[name])} ".encode())
        digest.update(columns[name])
    return digest.hexdigest()
