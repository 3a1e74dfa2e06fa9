"""Transfer of an item from a worker to its parent: tensors through a shared file in memory, the rest as bytes.

Both processes use the same descriptor, because one was forked from the other. The file ends with them.
"""

from __future__ import annotations

import ctypes
import io
import os
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor

_PLACE_BYTES = 1 << 40  # address space of a place; the file is sparse, and takes memory only for written bytes


def pack(item: object, memory: int, place: int) -> bytes:
    """Write the tensors in `item` to a place of the file, and the rest into the result.

    Args:
        item: plain data, dataclasses and CPU tensors.
        memory: descriptor of the file.
        place: index of the place, from 0; its old content is overwritten.
    """
    stream = io.BytesIO()
    _Packer(stream, memory, place * _PLACE_BYTES).dump(item)
    return stream.getvalue()


def unpack(data: bytes | bytearray) -> Any:
    """The item that was packed; its tensors are copies."""
    return ForkingPickler.loads(data)


class _Packer(ForkingPickler):
    def __init__(self, stream: io.BytesIO, memory: int, offset: int) -> None:
        super().__init__(stream)
        self._memory, self._offset = memory, offset

    def reducer_override(self, value: object) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        tensor, start = value.detach().contiguous(), self._offset
        source = _memory_of(tensor)
        while self._offset < start + tensor.nbytes:
            self._offset += os.pwrite(self._memory, source[self._offset - start :], self._offset)
        return _read, (self._memory, start, tensor.dtype, tuple(tensor.shape))


def _read(memory: int, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    target, offset = _memory_of(tensor), 0
    while offset < tensor.nbytes:
        length = os.preadv(memory, [target[offset:]], start + offset)
        if not length:
            raise EOFError(f"expected {tensor.nbytes} bytes, found {offset}")
        offset += length
    return tensor


def _memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor."""
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
