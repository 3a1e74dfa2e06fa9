"""Updates of weights with few parameters: LoRA (Hu et al. 2021, arXiv:2106.09685, eq. 3), LoHa, LoKr; and DoRA.

Letters: I O channels in and out, R rank, k kernel size. Each update is of one linear layer or convolution.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor


class WeightUpdate(ABC):
    """The update of a weight, W + Δ."""

    magnitude: Tensor | None
    """[O], the norms of the rows of the new weight (Liu et al. 2024, "DoRA", arXiv:2402.09353, eq. 5); None: they are
    free."""

    @abstractmethod
    def delta(self) -> Tensor:
        """Δ in float32: [O, I], or [O, I, k, k]."""

    def applied(self, weight: Tensor, scale: float = 1.0) -> Tensor:
        """The weight with the update, float32, of the same shape.

        Args:
            weight: W; that of a 1×1 convolution may be [O, I, 1, 1] where the update is [O, I], and the other way.
            scale: of the update. With magnitudes it scales the update before the norm, as PEFT does.
        """
        updated = weight.float() + scale * self.delta().view_as(weight)
        if self.magnitude is None:
            return updated
        rows = updated.flatten(1)
        norms: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        return self.magnitude.float().view(-1, 1).mul(rows).div(norms).view_as(updated)

    def to(self, device: torch.device) -> Self:
        """The same update with its tensors on a device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        moved = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **moved)  # type: ignore[type-var]


@dataclass(frozen=True, eq=False)
class LowRank(WeightUpdate):
    """The update of LoRA: Δ = (alpha / R) · up · down.

    Attributes:
        down: [R, I], or [R, I, k, k] of a convolution.
        up: [O, R], or [O, R, 1, 1] of a convolution.
        alpha: the update is scaled by alpha / R; R: by one.
        magnitude: see `WeightUpdate`.
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
        """See `WeightUpdate`."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return product.mul_(self.alpha / self.rank).view(-1, *self.down.shape[1:])


@dataclass(frozen=True, eq=False)
class Hadamard(WeightUpdate):
    """The update of LoHa (Hyeon-Woo et al. 2021, arXiv:2108.06098, eq. 2).

    Δ = (alpha / R) · (up · down) ∘ (up₂ · down₂).

    Attributes:
        down, down_2: [R, I·k·k].
        up, up_2: [O, R].
        alpha: as in `LowRank`.
        magnitude: see `WeightUpdate`.
    """

    down: Tensor
    up: Tensor
    down_2: Tensor
    up_2: Tensor
    alpha: float
    magnitude: Tensor | None = None

    def delta(self) -> Tensor:
        """See `WeightUpdate`."""
        first, second = self.up.float() @ self.down.float(), self.up_2.float() @ self.down_2.float()
        return first.mul_(second).mul_(self.alpha / self.down.shape[0])


@dataclass(frozen=True, eq=False)
class Kronecker(WeightUpdate):
    """The update of LoKr (Edalati et al. 2022, arXiv:2212.10650, eq. 3): Δ = scale · left ⊗ right.

    Attributes:
        left: [O₁, I₁].
        right: [O₂, I₂], or [O₂, I₂, k, k]; O = O₁·O₂, I = I₁·I₂.
        scale: of the product.
        magnitude: see `WeightUpdate`.
    """

    left: Tensor
    right: Tensor
    scale: float
    magnitude: Tensor | None = None

    def delta(self) -> Tensor:
        """See `WeightUpdate`."""
        left = self.left.float().view(*self.left.shape, *[1] * (self.right.ndim - 2))
        return torch.kron(left, self.right.float().contiguous()).mul_(self.scale)
