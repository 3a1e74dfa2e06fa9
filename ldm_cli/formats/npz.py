"""Archives of arrays as numpy writes them, without numpy: a zip file of `.npy` members.

Source: numpy's NEP 1, "A Simple File Format for NumPy Arrays".
"""

from __future__ import annotations

import ast
import ctypes
import math
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ldm_cli.errors import DataError
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


def read_npz(file: Path) -> dict[str, Tensor | str]:
    """The arrays of an archive by name, on the CPU; an array of one text is a string.

    Arrays of objects and of other types are left out: nothing is ever unpickled.

    Raises:
        DataError: the file is no archive of arrays, or damaged.
        OSError: it cannot be read.
    """
    found: dict[str, Tensor | str] = {}
    try:
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                if name.endswith(".npy") and (array := _parsed(archive.read(name))) is not None:
                    found[name.removesuffix(".npy")] = array
    except (zipfile.BadZipFile, ValueError, KeyError, struct.error, SyntaxError) as error:
        raise DataError(f"cannot read '{file}'", f"it is no .npz archive of arrays: {error}") from error
    return found


def write_npz(file: Path, arrays: Mapping[str, Tensor | str]) -> None:
    """Write an archive that `numpy.load` reads; the same arrays give the same bytes. Errors as in `whole_file`."""
    with whole_file(file) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), _encoded(array), zipfile.ZIP_DEFLATED)


def _parsed(data: bytes) -> Tensor | str | None:
    """The array of a `.npy` file; None if it is of a type that is not read."""
    if not data.startswith(_MAGIC):
        raise ValueError("a member is no array")
    start = 10 if data[6] == 1 else 12
    (length,) = struct.unpack("<H" if start == 10 else "<I", data[8:start])
    header = ast.literal_eval(data[start : start + length].decode("utf-8"))
    kind, shape, content = str(header["descr"]), header["shape"], data[start + length :]
    if kind.startswith("<U") and not shape:
        return content.decode("utf-32-le").rstrip("\0")
    if kind not in _DTYPES:
        return None
    dtype, count = _DTYPES[kind], math.prod(shape)
    if len(content) != count * dtype.itemsize:
        raise ValueError(f"an array of {list(shape)} has {len(content)} bytes")
    values = torch.frombuffer(bytearray(content), dtype=dtype) if count else torch.empty(0, dtype=dtype)
    if header["fortran_order"]:
        return values.view(shape[::-1]).permute(*reversed(range(len(shape))))
    return values.view(shape)


def _encoded(array: Tensor | str) -> bytes:
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
