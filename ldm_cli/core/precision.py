"""The types that networks compute in, by the names of `precision` in a recipe."""

from __future__ import annotations

from collections.abc import Mapping

import torch

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Types by name."""


def precision_on(device: torch.device | str, precision: str | None) -> str:
    """The precision; None stands for bf16 on CUDA and for fp32 elsewhere."""
    return precision or ("bf16" if torch.device(device).type == "cuda" else "fp32")


def autocast(device: torch.device | str, precision: str | None, *, cache_enabled: bool = True) -> torch.autocast:
    """A context within which networks with float32 weights compute in a type: `fp32` as they are, without autocast.

    Args:
        precision: a name in `DTYPES`; None: as in `precision_on`.
        cache_enabled: whether each weight is cast once per context; weights must not change within it then.

    Raises:
        KeyError: an unknown precision.
    """
    dtype = DTYPES[precision_on(device, precision)]
    is_half = dtype != torch.float32
    return torch.autocast(torch.device(device).type, dtype, enabled=is_half, cache_enabled=cache_enabled)
