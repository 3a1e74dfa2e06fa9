"""Arrays as numpy writes them into `.npy` files, without numpy.

Source: numpy's NEP 1, "A Simple File Format for NumPy Arrays".
"""

from __future__ import annotations

import ast
import ctypes
import math
import mmap
import os
import struct
from pathlib import Path

import torch
from torch import Tensor

from ldm_cli.errors import DataError, StorageError
from ldm_cli.inputs import open_input
from ldm_cli.storage import whole_file

_MAGIC = b"\x93NUMPY"
_DTYPES = {
    "<f8": torch.float64,
    "<f4": torch.float32,
    "<f2": torch.float16,
    "<i8": torch.int64,
    "<i4": torch.int32,
    "|u1": torch.uint8,
    "|b1": torch.bool,
}
_ALIGNMENT = 64
BROKEN = (ValueError, KeyError, TypeError, SyntaxError, struct.error)
"""What `parsed` raises for damaged content."""


def open_npy(file: Path) -> Tensor:
    """The array of a file, mapped: its bytes are read where they are used.

    Raises:
        InputNotFoundError: there is no such file.
        StorageError: it cannot be read.
        DataError: it is damaged, or holds objects or numbers of another type than we read.
    """
    try:
        with open_input(file) as stream:
            # A private mapping: torch takes writable memory only, and nothing is ever written to it.
            content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        array = parsed(content)
    except OSError as error:
        raise StorageError(f"cannot read '{file}'", os.strerror(error.errno or 0)) from error
    except BROKEN as error:
        raise DataError(f"cannot read '{file}'", f"it is no .npy file: {error}") from error
    if not isinstance(array, Tensor):
        raise DataError(f"cannot read '{file}'", "it holds no numbers of a type that is read")
    return array


def write_npy(file: Path, array: Tensor) -> None:
    """Write a file that `numpy.load` reads. Errors as in `whole_file`."""
    with whole_file(file) as temporary:
        temporary.write_bytes(encoded(array))


def parsed(data: bytearray | mmap.mmap) -> Tensor | str | None:
    """The array of a `.npy` file, which shares the memory of `data`; None if it is of a type that is not read.

    Raises:
        ValueError, KeyError, TypeError, SyntaxError, struct.error: the content is damaged.
    """
    if data[: len(_MAGIC)] != _MAGIC:
        raise ValueError("its beginning is another one")
    start = 10 if data[6] == 1 else 12
    (length,) = struct.unpack("<H" if start == 10 else "<I", data[8:start])
    header = ast.literal_eval(data[start : start + length].decode("utf-8"))
    kind, shape, start = str(header["descr"]), header["shape"], start + length
    if kind.startswith("<U") and not shape:
        return data[start:].decode("utf-32-le").rstrip("\0")
    if kind not in _DTYPES:
        return None
    dtype, count = _DTYPES[kind], math.prod(shape)
    if len(data) - start != count * dtype.itemsize:
        raise ValueError(f"an array of {list(shape)} has {len(data) - start} bytes")
    values = torch.frombuffer(data, dtype=dtype, offset=start) if count else torch.empty(0, dtype=dtype)
    if header["fortran_order"]:
        return values.view(shape[::-1]).permute(*reversed(range(len(shape))))
    return values.view(shape)


def encoded(array: Tensor | str) -> bytes:
    """The content of a `.npy` file of version 1."""
    shape: tuple[int, ...] = ()
    if isinstance(array, str):
        kind, content = f"<U{max(1, len(array))}", (array or "\0").encode("utf-32-le")
    else:
        kind = next(name for name, dtype in _DTYPES.items() if dtype == array.dtype)
        values = array.detach().cpu().contiguous()
        shape, content = tuple(values.shape), ctypes.string_at(values.data_ptr(), values.nbytes)
    header = repr({"descr": kind, "fortran_order": False, "shape": shape})
    padding = -(len(_MAGIC) + 4 + len(header) + 1) % _ALIGNMENT
    text = (header + " " * padding + "\n").encode("latin-1")
    return _MAGIC + b"\x01\x00" + struct.pack("<H", len(text)) + text + content
