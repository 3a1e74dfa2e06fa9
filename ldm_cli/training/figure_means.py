"""Means of the figures of several steps, for a line of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class FigureMeans:
    """Means of figures since the last logged line, on the device; checkpoints hold them.

    Each figure is averaged over the steps that had it and were not skipped: the figures of a skipped step are not
    finite.

    Attributes:
        sums, counts: name → float64 scalar.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}

    def add(self, figures: Mapping[str, Tensor], counts: Tensor) -> None:
        """Add the figures of a step; `counts` is 1.0 if they count, else 0.0."""
        for name, value in figures.items():
            value = torch.where(counts > 0, value.detach().double(), 0.0)
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0.0) + counts.double()

    def take(self) -> dict[str, Tensor]:
        """The means, on the device, NaN for figures that no step had; the next line starts empty."""
        means = {name: value / self.counts[name] for name, value in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means
