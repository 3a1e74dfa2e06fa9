"""Low-rank updates of weights (Hu et al. 2021, "LoRA", arXiv:2106.09685, eq. 3), with and without magnitudes.

Letters: I O channels in and out, R rank, k kernel size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """The update of one linear layer or convolution: W + (alpha / R) · up · down.

    Attributes:
        down: [R, I], or [R, I, k, k] of a convolution.
        up: [O, R], or [O, R, 1, 1] of a convolution.
        alpha: the update is scaled by alpha / R; R: by one.
        magnitude: [O], the norms of the rows of the new weight (Liu et al. 2024, "DoRA", arXiv:2402.09353, eq. 5);
            None: of plain LoRA.
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """R."""
        return self.down.shape[0]

    def delta(self) -> Tensor:
        """(alpha / R) · up · down in float32: [O, I], or [O, I, k, k]."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return product.mul_(self.alpha / self.rank).view(-1, *self.down.shape[1:])

    def applied(self, weight: Tensor, scale: float = 1.0) -> Tensor:
        """The weight with the update, float32, of the same shape.

        Args:
            weight: W.
            scale: of the update. With magnitudes it scales the update before the norm, as PEFT does.
        """
        updated = weight.float() + scale * self.delta()
        if self.magnitude is None:
            return updated
        rows = updated.flatten(1)
        norms: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        return self.magnitude.float().view(-1, 1).mul(rows).div(norms).view_as(updated)
