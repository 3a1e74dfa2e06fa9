"""Buffers that a training step changes: the running statistics of batch norms."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class EndsStep(Protocol):
    """A module whose buffers change beyond a mean, or whose weights follow from them."""

    def end_step(self, kept: Tensor) -> None:
        """Called when the buffers of a step are there, on all ranks alike; `kept` is 0 for a skipped step, else 1."""


class RunningStatistics:
    """The statistics of some modules' batch norms, which must not depend on the order of a batch's parts.

    Every part of a batch starts from the buffers as they were before the step. After the step they hold the mean of
    the parts' results.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        modules = list(modules)
        self._followers = [module for module in modules if isinstance(module, EndsStep)]
        layers = [layer for module in modules for layer in module.modules()]
        norms = [layer for layer in layers if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)]
        owners: list[nn.Module] = [*norms, *(module for module in modules if isinstance(module, EndsStep))]
        self._buffers = [buffer for owner in owners for buffer in owner.buffers()]
        self._before: list[Tensor] = []

    def begin_step(self) -> None:
        """Remember the buffers as they are."""
        self._before = [buffer.clone() for buffer in self._buffers]

    def take_change(self) -> list[Tensor]:
        """What a part changed, flat float32 per buffer; the buffers are as before the step again."""
        pairs = list(zip(self._buffers, self._before, strict=True))
        changes = [(buffer - before).float().reshape(-1) for buffer, before in pairs]
        for buffer, before in pairs:
            buffer.copy_(before)
        return changes

    def apply(self, change: Tensor, kept: Tensor) -> None:
        """End the step.

        Args:
            change: the mean of what the parts changed: all buffers in a row, float32.
            kept: 1.0 if the step was taken, else 0.0, and the change, which may not be finite, is dropped.
        """
        changes = torch.split(change, [buffer.numel() for buffer in self._buffers])
        for buffer, before, part in zip(self._buffers, self._before, changes, strict=True):
            buffer.copy_(torch.where(kept > 0, before + part.view(before.shape), before))
        for module in self._followers:
            module.end_step(kept)
