"""The part of a scheduler_config.json by which a flow's shift depends on the size of the picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ldm_cli.errors import CheckpointError


@dataclass(frozen=True)
class DynamicShift:
    """The shift of a flow that depends on the size of the picture (`use_dynamic_shifting` in diffusers).

    Attributes:
        base_image_seq_len, max_image_seq_len: two numbers of image tokens.
        base_shift, max_shift: μ at these; on the line through both at others.
        time_shift_type: the shift is e^μ, or μ itself.
    """

    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15
    time_shift_type: Literal["exponential", "linear"] = "exponential"

    def at(self, num_tokens: int) -> float:
        """The shift for a number of image tokens."""
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        mu = self.base_shift + slope * (num_tokens - self.base_image_seq_len)
        return math.exp(mu) if self.time_shift_type == "exponential" else mu


def read_dynamic_shift(content: Mapping[str, Any], file: Path) -> DynamicShift:
    """What the content of a scheduler file says.

    Raises:
        CheckpointError: it is not made of numbers, or of two equal ones.
    """
    found = DynamicShift(**{field.name: content[field.name] for field in fields(DynamicShift) if field.name in content})
    numbers = [value for name, value in vars(found).items() if name != "time_shift_type"]
    if found.time_shift_type not in ("exponential", "linear") or not all(isinstance(n, int | float) for n in numbers):
        raise CheckpointError(f"cannot use '{file}'", "use_dynamic_shifting needs numbers", "correct the file")
    if found.base_image_seq_len == found.max_image_seq_len:
        raise CheckpointError(f"cannot use '{file}'", "base_image_seq_len is max_image_seq_len", "correct the file")
    return found
