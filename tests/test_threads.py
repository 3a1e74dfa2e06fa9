"""Computing alone is a matter of the thread that asks for it, and holds for every library that shares out work."""

from __future__ import annotations

import ctypes
import threading

import pytest
import torch

from ldm_cli.threads import compute_alone


def threads_of_mkl() -> int:
    library = ctypes.CDLL(torch._C.__file__)
    if not hasattr(library, "MKL_Get_Max_Threads"):
        pytest.skip("torch without MKL")
    return int(library.MKL_Get_Max_Threads())


@pytest.mark.usefixtures("two_threads")
def test_torch_and_mkl_use_one_thread_there_and_two_here() -> None:
    seen: list[tuple[int, int]] = []

    def work() -> None:
        compute_alone()
        seen.append((torch.get_num_threads(), threads_of_mkl()))

    here = torch.get_num_threads(), threads_of_mkl()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(1, 1)]
    assert here == (2, 2) == (torch.get_num_threads(), threads_of_mkl())
