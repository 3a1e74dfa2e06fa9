"""How images pass through the latent of an autoencoder in training."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from ldm_cli.data.batch import Batch
from ldm_cli.errors import DivergedError


@dataclass(frozen=True)
class LatentTerms:
    """What a latent adds to the loss of a part, and figures to log."""

    weighted: Mapping[str, tuple[float, Tensor]]
    """Name → weight and scalar."""
    figures: Mapping[str, Tensor] = field(default_factory=dict)


class Latent(Protocol):
    """The latent of an autoencoder in training.

    Attributes:
        auxiliary: name → module with the state that belongs to the training alone.
    """

    auxiliary: dict[str, nn.Module]

    def through(self, images: Tensor, batch: Batch, start: int, step: int) -> tuple[Tensor, LatentTerms]:
        """Reconstruct images with gradient.

        Args:
            images: [B, 3, H, W] in [−1, 1], of a part of a step's batch.
            start: place of the part's first sample in the global batch.
            step: 1-based.
        """

    def held_out_rows(self, images: Tensor) -> Tensor:
        """What `held_out_figures` has to know of images [B, 3, H, W] in [−1, 1]: [n, B]."""

    def held_out_figures(self, rows: Tensor) -> dict[str, float]:
        """Figures of all held-out images, from the rows of all of them."""

    def finalize(self, batches: Callable[[], Iterable[Batch]], frozen: Collection[str]) -> dict[str, float]:
        """Measure the latent of a trained model, and store its factors in the model's configuration.

        Args:
            batches: gives training images, always the same.
            frozen: names of frozen parameters.

        Returns:
            The factors, by name.

        Raises:
            DivergedError: mean or deviation is not finite.
        """


def finite_scale(deviation: float, shift: float = 0.0) -> float:
    """The factor that brings latents to deviation 1.

    Raises:
        DivergedError: it or the shift is not finite.
    """
    scale = 1.0 / deviation if deviation else math.inf
    if not (math.isfinite(scale) and math.isfinite(shift) and scale > 0.0):
        raise DivergedError("the autoencoder's latents are not finite", f"scale={scale}, shift={shift}")
    return scale
