"""The image shapes of aspect buckets, and which of them a picture goes to."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm_cli.data.config import DataConfig

Shape = tuple[int, int]
"""Height and width, in pixels."""


def shapes_of(config: DataConfig) -> list[Shape]:
    """The shapes that batches have: one for each bucket, else the square of `image_size`."""
    if config.aspect_buckets is None:
        return [(config.image_size, config.image_size)]
    return bucket_shapes(config.image_size, config.aspect_buckets.step, config.aspect_buckets.max_aspect)


def bucket_shapes(image_size: int, step: int, max_aspect: float) -> list[Shape]:
    """Heights and widths in multiples of `step`, of at most `image_size`² pixels and nearly as many.

    Each width has the greatest height that fits, and the transposed shape (NovelAI, "Improvements on Stable Diffusion",
    2022: aspect ratio bucketing).
    """
    shapes: set[Shape] = set()
    for width in range(step, image_size + 1, step):
        height = image_size**2 // width // step * step
        if height and max(height, width) <= max_aspect * min(height, width):
            shapes |= {(height, width), (width, height)}
    return sorted(shapes) or [(image_size, image_size)]


def nearest_shapes(sizes: Tensor, shapes: Sequence[Shape]) -> Tensor:
    """For each picture the number of the nearest shape in the logarithm of the aspect ratio.

    Args:
        sizes: [N, 2], widths and heights.
        shapes: of the buckets.

    Returns:
        int64 [N].
    """
    targets = torch.tensor([math.log(width / height) for height, width in shapes], dtype=torch.float64)
    known = sizes.double().clamp(min=1)
    return (torch.log(known[:, 0] / known[:, 1])[:, None] - targets).abs().argmin(dim=1)
