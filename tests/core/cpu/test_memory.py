"""Memory that is kept: large buffers are taken from the heap, not asked of the kernel one by one."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

SCRIPT = """
import torch
from ldm_cli.core.cpu import tune_for_cpu

def is_in_the_heap():
    buffer = torch.ones(32 << 20)
    with open("/proc/self/maps") as maps:
        parts = [line.split()[0].split("-") for line in maps if line.endswith("[heap]\\n")]
    return any(int(low, 16) <= buffer.data_ptr() < int(high, 16) for low, high in parts)

before = is_in_the_heap()
tune_for_cpu(torch.nn.Linear(1, 1))
print(before, is_in_the_heap())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
def test_large_buffers_are_taken_from_the_heap_where_memory_is_kept() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "False True", run.stderr
