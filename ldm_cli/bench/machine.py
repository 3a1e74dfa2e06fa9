"""Description and measured peak performance of this machine."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ldm_cli.core.cpu import tune_for_cpu

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def describe(device: torch.device) -> dict[str, Any]:
    """Processor, threads, GPU and the versions of the libraries that decide speed."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("diffusers", "transformers", "webdataset"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    machine: dict[str, Any] = {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine | {"versions": versions}


def ceiling(device: torch.device, precision: str = "fp32", rounds: int = 5) -> dict[str, float]:
    """The best of several rounds of basic operations on tensors that exceed the caches.

    Returns:
        `matmul`, of the faster library, and `convolution` in GFLOP/s (2 per multiply-add), `copy` in GB/s of read and
        written bytes.
    """
    dtype = _DTYPES[precision]
    large = device.type == "cuda"
    n = 8192 if large else 1536
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    layer = nn.Linear(n, n, bias=False, device=device, dtype=dtype)
    tune_for_cpu(layer)  # on a CPU by another library than `a @ b`
    channels, side = (512, 64) if large else (128, 32)
    x = torch.randn(16, channels, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    kernel = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    source = torch.randn((1 << 30) // 4 if large else (128 << 20) // 4, device=device)
    target = torch.empty_like(source)
    with torch.inference_mode():
        seconds = _best(
            {
                "matmul": lambda: a @ b,
                "linear": lambda: layer(a),
                "convolution": lambda: F.conv2d(x, kernel, padding=1),
                "copy": lambda: target.copy_(source),
            },
            device,
            rounds,
        )
    convolution_flops = 2.0 * x.numel() * channels * 9
    return {
        "matmul": 2.0 * n**3 / min(seconds["matmul"], seconds["linear"]) / 1e9,
        "convolution": convolution_flops / seconds["convolution"] / 1e9,
        "copy": 2.0 * source.nbytes / seconds["copy"] / 1e9,
    }


def _best(work: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """Least seconds of each operation. They take turns, and the first round does not count."""
    best = dict.fromkeys(work, float("inf"))
    for number in range(rounds + 1):
        for name, do in work.items():
            _wait(device)
            start = time.perf_counter()
            do()
            _wait(device)
            if number:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} × {len(names)}" if names else platform.machine()
