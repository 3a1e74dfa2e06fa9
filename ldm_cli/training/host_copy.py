"""Copies of tensors in the host's memory."""

from __future__ import annotations

import torch
from torch import Tensor


def host_copy(tensor: Tensor) -> Tensor:
    """A contiguous copy in the host's memory.

    From CUDA it goes to pinned memory, in the order of the current stream, without waiting: later work on that stream
    may change `tensor`, but the copy may only be read once an event recorded after it is done.
    """
    is_pinned = tensor.is_cuda
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=is_pinned)
    return copy.copy_(tensor.detach(), non_blocking=is_pinned)
