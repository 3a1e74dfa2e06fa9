"""Description and measured speed of this machine."""

from __future__ import annotations

import platform
import time
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm_cli.bench.race import wait_for
from ldm_cli.core.cpu import tune_for_cpu
from ldm_cli.core.precision import DTYPES


def describe(device: torch.device) -> dict[str, Any]:
    """Processor, threads, GPU and the versions of the libraries that decide speed."""
    packages = [name for name in ("torch", "diffusers", "transformers", "webdataset") if util.find_spec(name)]
    machine: dict[str, Any] = {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in packages}
    return machine | {"versions": versions}


@torch.inference_mode()
def matmul_gflops(device: torch.device, precision: str = "fp32", rounds: int = 5) -> float:
    """GFLOP/s (2 per multiply-add) of a large matrix product, by the faster of torch's two libraries; best round."""
    n, dtype = 8192 if device.type == "cuda" else 1536, DTYPES[precision]
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    linear = nn.Linear(n, n, bias=False, device=device, dtype=dtype)
    tune_for_cpu(linear)  # on a CPU by another library than `a @ b`
    seconds = []
    for _ in range(rounds + 1):
        for multiply in (b.matmul, linear):
            wait_for(device.type)
            start = time.perf_counter()
            multiply(a)
            wait_for(device.type)
            seconds.append(time.perf_counter() - start)
    return 2.0 * n**3 / min(seconds[2:]) / 1e9  # the first round warms up


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} × {len(names)}" if names else platform.processor() or platform.machine()
