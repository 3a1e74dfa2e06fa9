"""What a trainer trains, as the loop sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

from torch import Tensor, nn

BatchT = TypeVar("BatchT")
BatchT_contra = TypeVar("BatchT_contra", contravariant=True)
Losses = Iterator[tuple[Tensor, dict[str, Tensor]]]


class Task(Protocol[BatchT_contra]):
    """What a trainer trains."""

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Name → module that is trained, averaged and exported."""

    @property
    def auxiliary(self) -> Mapping[str, nn.Module]:
        """Name → module that is trained only (a discriminator)."""

    def losses(self, batch: BatchT_contra, num_parts: int, step: int) -> Losses:
        """Yield a scalar for each of `num_parts` equal parts of the batch, with figures to log.

        The mean of the scalars has the gradient of the loss of the *global* batch when it is taken over the parts of
        all ranks, of which `batch` holds this one's samples. So have the figures, and the scalars unless a figure
        named `loss` takes their place. The caller runs `backward()` on each before asking for the next, so that only
        one part's activations are alive at a time.
        """

    def validate(self) -> dict[str, float]:
        """Figures of the modules' present weights on held-out data, a pure function of the weights."""

    def picture(self, folder: Path) -> None:
        """Draw samples of the modules' present weights into `folder`, if there is anything to draw."""

    def export(self, folder: Path) -> None:
        """Write the modules' present weights to `folder` in their standard layout."""

    def restore(self, folder: Path) -> None:
        """Inverse of `export`: read the modules' weights back, bit for bit."""

    def finalize(self) -> dict[str, float]:
        """Last changes to the finished modules (measured latent statistics); returns figures to log."""


def sample_names(batch: object) -> list[str]:
    """`shard/key` of each sample of a batch, where it has names."""
    names = getattr(batch, "keys", None)
    return names if isinstance(names, list) else []


def in_parts(loss: Callable[[BatchT], tuple[Tensor, dict[str, Tensor]]], parts: list[BatchT]) -> Losses:
    """`Task.losses` of a loss that is a mean over independent samples."""
    for part in parts:
        yield loss(part)
