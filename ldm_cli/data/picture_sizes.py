"""The sizes of a training picture, as Stable Diffusion XL is conditioned on them."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm_cli.data.decode import CENTRE, Crop, Place, part_of


def picture_sizes(
    original: tuple[int, int], target: tuple[int, int], crop: Crop, place: Place = CENTRE, mirror: bool = False
) -> Tensor:
    """What `to_rectangle` does to a picture: int64 [6], in pixels (Podell et al. 2023, arXiv:2307.01952, section 2.2).

    Height and width of the picture; what is cut off at the top and at the left of the resized, mirrored picture; height
    and width of the result.

    Args:
        original: height and width of the picture.
        target, crop, place, mirror: as in `to_rectangle`.
    """
    height, width = original
    top = left = 0
    if crop != "squash":
        west, north, east, south = part_of((width, height), target[1], target[0], place, crop)
        top = round(north * target[0] / (south - north))
        left = round((width - east if mirror else west) * target[1] / (east - west))
    return torch.tensor([height, width, top, left, *target])
