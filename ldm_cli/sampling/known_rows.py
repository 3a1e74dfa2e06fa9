"""How few rows will do (`fixed_rows.py`), remembered between processes: finding out takes as long as several steps.

It is a matter of shapes, code and machine. All of them are in the name under which an answer is kept, so that another
torch, processor or number of threads, other switches of its libraries or an edited model ask anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ldm_cli.core import cpu, models
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.errors import LdmError
from ldm_cli.sampling.fixed_rows import enough, trial
from ldm_cli.storage import user_cache, write_whole

_SWITCHES = ("ATEN_", "DNNL_", "KMP_", "MKL_", "OMP_", "ONEDNN_")
_OF_A_PROCESSOR = ("vendor_id", "cpu family", "model", "model name", "stepping", "cache size", "flags")


def rows_that_do(
    unet: UNet2DConditionModel,
    count: int,
    size: int,
    latent_size: tuple[int, int],
    context_shape: tuple[int, int],
    halves: set[int],
    *,
    alone: bool = False,
) -> int:
    """How many images to give to a U-Net; arguments as of `enough` and `trial`, which are asked once."""
    if count == size and not alone:
        return size
    question = [count, size, latent_size, context_shape, sorted(halves), alone]
    file = user_cache() / "rows" / _digest(unet, question)
    with suppress(OSError, ValueError):
        known = int(file.read_text(encoding="ascii"))
        if count <= known <= size or (alone and known == 0):
            return known
    found = enough(trial(unet, size, latent_size, context_shape, halves), count, size, alone=alone)
    with suppress(OSError, LdmError):  # then the next one asks again
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, str(found))
    return found


def _digest(unet: UNet2DConditionModel, question: list[Any]) -> str:
    """The name of an answer."""
    facts = [_machine(), _code(), unet.config.to_mapping(), str(next(unet.parameters()).dtype), question]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _machine() -> list[Any]:
    """What decides which kernels run."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
        named = dict(line.partition(":")[::2] for line in first.splitlines())
        processor = {name.strip(): value for name, value in named.items() if name.strip() in _OF_A_PROCESSOR}
    except OSError:
        processor = {"name": platform.processor()}
    switches = {name: value for name, value in os.environ.items() if name.startswith(_SWITCHES)}
    versions = [torch.__version__, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
    return [versions, processor, switches]


def _code() -> list[Any]:
    """Which code the network is of: its files, their sizes and when they were written."""
    files = sorted(file for room in (models, cpu) for file in Path(next(iter(room.__path__))).glob("*.py"))
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
