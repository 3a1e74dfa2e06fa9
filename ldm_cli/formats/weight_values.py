"""What the values of weights show of damage, where no manifest says what they were."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ldm_cli.errors import CheckpointError
from ldm_cli.formats.weight_files import named

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)

# Layers that begin as zeros, so that a block of an untrained network passes on what it is given.
_BEGIN_AS_ZEROS = frozenset({"conv2", "conv_out", "proj_out", "linear"})
# Of DINOv2; features of whole images do not take it.
_UNUSED = ".mask_token"


class ValueProblems:
    """Tensors whose values no training writes: not finite, or zeros in the place of a matrix or convolution."""

    def __init__(self) -> None:
        self._infinite: list[str] = []
        self._zero: list[str] = []

    def look_at(self, name: str, tensor: Tensor) -> None:
        """Note the problem of a tensor, if it has one; it is read once."""
        largest = _largest(tensor)
        if not largest < float("inf"):
            self._infinite.append(name)
        layer = name.rpartition(".")[0].rpartition(".")[2]
        is_matrix = tensor.is_floating_point() and tensor.ndim > 1 and tensor.numel() > 0
        if is_matrix and largest == 0 and layer not in _BEGIN_AS_ZEROS and not name.endswith(_UNUSED):
            self._zero.append(name)

    def expect_none(self, source: Path) -> None:
        """Raises CheckpointError that names up to five tensors, read from `source`, of one problem."""
        if self._infinite:
            cause = named(self._infinite)
            raise CheckpointError(f"the tensors in '{source}' are not finite", cause, "take an earlier checkpoint")
        if self._zero:
            cause, remedy = named(self._zero), "download or save them again"
            raise CheckpointError(f"tensors in '{source}' hold nothing but zeros", cause, remedy)


def expect_sound(tensors: Mapping[str, Tensor], source: Path) -> None:
    """Raises CheckpointError as `ValueProblems` for all `tensors`, read from `source`."""
    problems = ValueProblems()
    for name, tensor in tensors.items():
        problems.look_at(name, tensor)
    problems.expect_none(source)


def expect_finite(tensors: Mapping[str, Tensor], source: Path) -> None:
    """Raises CheckpointError that names up to five of the `tensors`, read from `source`, that are not finite."""
    if bad := [name for name, tensor in tensors.items() if not is_finite(tensor)]:
        raise CheckpointError(f"the tensors in '{source}' are not finite", named(bad), "take an earlier checkpoint")


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite."""
    return _largest(tensor) < float("inf")


def _largest(tensor: Tensor) -> float:
    """The largest absolute value in float32, the type that weights are used in: a large float64 is infinite there.

    NaN where any number is: the extremes are 17 times as fast as a test of each number. 0 for whole numbers.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return 0.0
    if tensor.dtype in FLOAT8:
        tensor = tensor.float()
    least, most = (extreme.float() for extreme in tensor.aminmax())
    return float(torch.maximum(-least, most))
