"""Memory that is kept: large buffers are taken from the heap, not asked of the kernel one by one."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

SCRIPT = """
import sys
import torch
from ldm_cli.core.cpu import tune_for_cpu

if sys.argv[1] == "kept":
    tune_for_cpu(torch.nn.Linear(1, 1))
buffer = torch.ones(32 << 20)
with open("/proc/self/maps") as maps:
    parts = [line.split()[0].split("-") for line in maps if line.endswith("[heap]\\n")]
print(any(int(low, 16) <= buffer.data_ptr() < int(high, 16) for low, high in parts))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
@pytest.mark.parametrize(("how", "expected"), [("kept", "True"), ("plain", "False")])
def test_large_buffers_are_taken_from_the_heap_where_memory_is_kept(how: str, expected: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, how], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert run.stdout.strip() == expected, run.stderr
