"""What a trainer trains, as the loop sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

WeightsByModule = Mapping[str, Mapping[str, Tensor]]
"""Name of a module → its state dict."""

BatchT = TypeVar("BatchT")


class Task(Protocol[BatchT]):
    """What a trainer trains: models, and what one step of them computes."""

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Name → module that is trained, averaged and exported."""

    @property
    def auxiliary(self) -> Mapping[str, nn.Module]:
        """Name → module that is trained only (a discriminator)."""

    @property
    def num_files(self) -> int:
        """How many files of each weight `export` writes."""

    def prepare(self, batch: BatchT) -> BatchT:
        """The work on the host that comes before a step, such as token ids. A thread may do it ahead of the step."""

    def parts(self, batch: BatchT, num_parts: int) -> Sequence[Any]:
        """This rank's samples of a step as equal parts, each an argument of `loss`.

        A loss that needs the whole batch (a contrastive one) computes here what its parts have to know of one another.
        """

    def loss(self, part: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one part, a scalar with gradient, and scalar figures to log.

        The mean over the parts of all ranks has the gradient of the loss of the global batch. The mean of the figures
        is logged, and that of the loss, unless a figure named `loss` takes its place.

        Args:
            part: one of `parts`. Its backward pass runs before the next part's loss, so that the activations of one
                part are in memory at a time.
            step: 1-based.
        """

    def validate(self) -> dict[str, float]:
        """Figures of the modules' current weights on held-out data, a pure function of the weights.

        Every rank calls that holds full weights, and they may share the work; the figures of rank 0 count.
        """

    def picture(self, folder: Path | None) -> None:
        """Generate samples of the modules' current weights into `folder`, if there is anything to show.

        Every rank calls that holds full weights, and they may share the work; only rank 0 is given a folder.
        """

    def export(self, folder: Path, weights: WeightsByModule) -> None:
        """Write weights of `modules` to `folder` in their standard layout; may run beside the training."""

    def restore(self, folder: Path) -> None:
        """Inverse of `export`: read the modules' weights back, bit for bit."""

    def finalize(self) -> dict[str, float]:
        """Make the last changes to the finished modules (measured latent statistics); returns figures to log."""


def sample_names(batch: object) -> list[str]:
    """`shard/key` of each sample of a batch, where it has names."""
    names = getattr(batch, "keys", None)
    return names if isinstance(names, list) else []
