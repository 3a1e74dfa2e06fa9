"""Exponential moving average of the weights (Polyak & Juditsky 1992; decay warm-up as in TensorFlow's
`ExponentialMovingAverage`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class ExponentialMovingAverage:
    """Averages of some parameters; `averaged()` swaps them into the parameters.

    Buffers (batch-norm statistics) are averages already and are not averaged again.
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float, warmup: bool) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay={decay} is not in [0, 1)")
        self.decay, self.warmup = decay, warmup
        self.live: list[Tensor] = list(parameters)
        self.average = [p.detach().clone() for p in self.live]

    def decay_at(self, step: int) -> float:
        """Decay used after optimizer step `step` (1-based)."""
        return min(self.decay, (1.0 + step) / (10.0 + step)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, step: int, kept: Tensor) -> None:
        """average ← average + (1 − decay)·kept·(weights − average); `kept` is 0 for a skipped step or 1."""
        weight = (1.0 - self.decay_at(step)) * kept
        torch._foreach_lerp_(self.average, self.live, [weight] * len(self.live))

    def by_parameter(self) -> dict[Tensor, Tensor]:
        """Parameter → its average."""
        return dict(zip(self.live, self.average, strict=True))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the parameters hold the averages, and writing to them changes the averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        # By value: a part of a sharded parameter has to stay in its place.
        for live, average in zip(self.live, self.average, strict=True):
            before = live.clone()
            live.copy_(average)
            average.copy_(before)
