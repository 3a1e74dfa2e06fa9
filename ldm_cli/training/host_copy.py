"""Copies of tensors in the host's memory, and how to know that they have arrived."""

from __future__ import annotations

import torch
from torch import Tensor


def host_copy(tensor: Tensor) -> Tensor:
    """A contiguous copy in the host's memory.

    From CUDA it goes to pinned memory, in the order of the current stream, without waiting: later work on that stream
    may change `tensor`, but the copy may only be read once an event recorded after it is done.
    """
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor.detach(), non_blocking=tensor.device.type != "cpu")


def mark(device: torch.device) -> torch.cuda.Event | None:
    """An event that is done when the device has done the work given to it so far; None where the host waits anyway."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event
