"""The number of threads that torch uses for a thread of ours."""

from __future__ import annotations

import ctypes
from contextlib import suppress

import torch


def compute_alone() -> None:
    """Let torch compute in the calling thread alone; `torch.set_num_threads` would change all threads.

    This sets the number for both OpenMP and MKL, for which torch keeps separate numbers. It has no effect with
    libraries other than those of torch's builds for Linux.
    """
    torch.get_num_threads()  # torch initializes the number of a thread at its first query
    for name in ("omp_set_num_threads", "MKL_Set_Num_Threads_Local"):
        with suppress(OSError, AttributeError):
            getattr(ctypes.CDLL(torch._C.__file__), name)(1)
