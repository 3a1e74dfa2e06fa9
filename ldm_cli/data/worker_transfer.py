"""How an item travels from a worker to its parent: its tensors through a shared file in memory, the rest as bytes.

Both processes know the file by the same descriptor, because one was forked from the other. Nothing of it
outlives them.
"""

from __future__ import annotations

import ctypes
import io
import os
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor

_PLACE_BYTES = 1 << 40  # the file is sparse: a place takes what was written there


def pack(item: object, memory: int, place: int) -> bytes:
    """Write the tensors in `item` to a place of the file, over what was there, and the rest into the result.

    Args:
        item: plain data, dataclasses and CPU tensors.
        memory: descriptor of the file.
        place: which of its places, from 0.
    """
    stream = io.BytesIO()
    _Packer(stream, memory, place * _PLACE_BYTES).dump(item)
    return stream.getvalue()


def unpack(data: bytes | bytearray) -> Any:
    """The item that was packed, with tensors of its own."""
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
            raise EOFError(f"{tensor.nbytes} bytes were to be there, found {offset}")
        offset += length
    return tensor


def _memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor."""
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
