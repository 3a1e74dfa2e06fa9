"""Signatures of pictures: vectors whose cosine is near 1 for copies of one picture, without a model.

A signature holds the low frequencies of a picture, as the perceptual hash of Zauner 2010, "Implementation and
benchmarking of perceptual image hash functions", section 3.2.1: coefficients of its cosine transform. Unlike that
hash it keeps colours, and numbers instead of signs: in symmetric pictures many coefficients are near 0, and their signs
random.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 16
"""Height and width of the thumbnails that signatures are made of, in pixels."""

_LUMA, _CHROMA = 8, 4  # frequencies along each side
_MEAN = 0.3  # weight of the mean colour: with 1, all small things on a blue sky would be alike
_BRIGHTNESS = 0.05  # weight of the mean brightness: it matters for blank pictures alone
_CROP = 0.95  # side of a crop in picture sides
_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))

Part = tuple[float, float, float]
"""Left edge, upper edge and side of a square part, in picture sides."""
WHOLE: Part = (0.0, 0.0, 1.0)
Signer = Callable[[Tensor], Tensor]
"""Thumbnails uint8 [B, 3, SIDE, SIDE] → signatures float32 [B, D]."""


def signatures(thumbnails: Tensor, part: Part = WHOLE, mirror: bool = False) -> Tensor:
    """The signatures of pictures, or of a part of each, mirrored left to right or not.

    Args:
        thumbnails: uint8 [B, 3, SIDE, SIDE], the whole pictures.

    Returns:
        float32 [B, D] of length 1.
    """
    pictures = torch.einsum("kc,bchw->bkhw", torch.tensor(_YCBCR), thumbnails.float() / 255)
    left, top, side = part
    waves = _waves(top, side) @ (pictures.flip(-1) if mirror else pictures) @ _waves(left, side).T
    brightness = waves[:, 0, 0, 0].clone()
    waves[:, :, 0, 0] *= torch.tensor((0, _MEAN, _MEAN))
    blank = _BRIGHTNESS * torch.stack((brightness, 1 - brightness), 1)
    chroma = waves[:, 1:, :_CHROMA, :_CHROMA]
    return F.normalize(torch.cat((waves[:, 0].flatten(1), chroma.flatten(1), blank), 1))


def views() -> Sequence[Signer]:
    """The signatures under which a picture is looked up: of the whole and of nine crops by 5 %, also mirrored.

    The first is that of the picture as it is.
    """
    edges = (0.0, (1 - _CROP) / 2, 1 - _CROP)
    parts = [WHOLE, *((left, top, _CROP) for left, top in product(edges, edges))]
    return [partial(signatures, part=part, mirror=mirror) for mirror in (False, True) for part in parts]


@lru_cache
def _waves(start: float, side: float) -> Tensor:
    """Rows of the cosine transform (DCT-II, orthonormal) of a part of a line of pixels: [_LUMA, SIDE].

    A pixel that the part covers in part counts in part.
    """
    edges = torch.arange(SIDE + 1) / SIDE
    covered = (edges[1:].clamp(max=start + side) - edges[:-1].clamp(min=start)).clamp(min=0)
    place = (((edges[1:] + edges[:-1]) / 2 - start) / side).clamp(0, 1)
    waves = torch.cos(math.pi * torch.arange(_LUMA)[:, None] * place) * covered / covered.sum()
    waves[1:] *= math.sqrt(2)
    return waves
