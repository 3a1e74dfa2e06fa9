"""All that a denoiser is given beside the noisy sample and the time.

Letters: B batch, M tokens, D width, P width of a pooled vector, C channels, h w size of the latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol, Self

import torch
from torch import Tensor

NUM_SIZES = 6
"""Numbers of `Condition.with_sizes`."""


@dataclass(frozen=True)
class Condition:
    """What one batch is conditioned on; each field has B rows, or is None where the denoiser has no use for it.

    Attributes:
        tokens: [B, M, D], seen by cross- or joint-attention, or by a prior's self-attention.
        pooled: [B, P], added to the time embedding: pooled text and, for SDXL, the six sizes in pixels after it; an
            image embedding; or class indices, int64 [B].
        image_tokens: [B, M', D], tokens of image prompts.
        concat: [B, C', h, w], joined to the noisy sample as further channels: a mask and the masked latents, or a
            low-resolution image.
        mask: [B, M], 1 for tokens that a prior sees, 0 for padding.
        guidance: [B, P'], embedding of the guidance scale, for denoisers that were distilled with guidance.
    """

    tokens: Tensor | None = None
    pooled: Tensor | None = None
    image_tokens: Tensor | None = None
    concat: Tensor | None = None
    mask: Tensor | None = None
    guidance: Tensor | None = None

    @classmethod
    def combined(cls, function: Callable[[Sequence[Tensor]], Tensor], conditions: Sequence[Condition]) -> Self:
        """Apply `function` to each field of several conditions.

        Raises:
            ValueError: a field is a tensor in one condition and None in another.
        """
        values: dict[str, Tensor | None] = {}
        for field in fields(cls):
            tensors = [tensor for c in conditions if (tensor := getattr(c, field.name)) is not None]
            if 0 < len(tensors) < len(conditions):
                raise ValueError(f"Condition.combined: {len(tensors)} of {len(conditions)} have '{field.name}'")
            values[field.name] = function(tensors) if tensors else None
        return cls(**values)

    @classmethod
    def cat(cls, conditions: Sequence[Condition]) -> Self:
        """The rows of several conditions, one after the other."""
        return cls.combined(lambda tensors: torch.cat(list(tensors)), conditions)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The fields that are not None, by name: `Condition(**condition.tensors)` is the same condition."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Apply `function` to each field that is not None."""
        return self.combined(lambda tensors: function(tensors[0]), [self])

    def replaced(self, is_replaced: Tensor, other: Condition) -> Self:
        """The rows of `other`, or its only one, where `is_replaced` bool [B] is true.

        Raises:
            ValueError: as in `combined`.
        """

        def choose(pair: Sequence[Tensor]) -> Tensor:
            ours, theirs = pair
            return torch.where(is_replaced.view(-1, *[1] * (ours.ndim - 1)), theirs, ours)

        return self.combined(choose, [self, other])

    def with_sizes(self, sizes: Tensor) -> Self:
        """With sizes of the picture after the pooled text, as float32 (Podell et al. 2023, arXiv:2307.01952, 2.2).

        Args:
            sizes: [B, 6] or [1, 6], in pixels: height and width of the picture before it was resized; pixels cut off
                at its top and left after that; height and width of what is left.

        Raises:
            ValueError: there is no pooled text.
        """
        if self.pooled is None:
            raise ValueError("Condition.with_sizes: pooled is None")
        rows = sizes.to(self.pooled.device, torch.float32, non_blocking=True).expand(len(self.pooled), -1)
        return replace(self, pooled=torch.cat([self.pooled.float(), rows], dim=1))


class Denoiser(Protocol):
    """A network that predicts noise, velocity or the clean sample from a noisy one."""

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Predict.

        Args:
            x: noisy samples [B, C, h, w].
            t: float [B] or [1], in the unit that the network was trained with (`Process.at`).
            condition: B rows.

        Returns:
            [B, C, h, w].
        """
