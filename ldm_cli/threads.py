"""How many threads torch computes with, from one thread of ours."""

from __future__ import annotations

import ctypes
from contextlib import suppress

import torch


def compute_alone() -> None:
    """Let torch use no other thread from the calling one: `torch.set_num_threads` would be for all of them.

    Both who share out work are told: OpenMP, and MKL, to which torch has given a number of its own. Where a library is
    another one than that of torch's builds for Linux, nothing happens.
    """
    torch.get_num_threads()  # torch sets the number of a thread when it is first asked for
    for name in ("omp_set_num_threads", "MKL_Set_Num_Threads_Local"):
        with suppress(OSError, AttributeError):
            getattr(ctypes.CDLL(torch._C.__file__), name)(1)
