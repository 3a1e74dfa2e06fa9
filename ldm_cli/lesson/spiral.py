"""The data of the lesson: points on a spiral, and three classes that overlap along it.

A position s in [0, 1] is the share of the arm's length from the inner end. Coordinates are standardized: their mean is
0, as for the latents of pictures, and the mean of x² + y² is 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ldm_cli import philox

NUM_CLASSES = 3
"""Classes lie along the arm: inner, middle, outer."""

_TURNS = 2.0
_INNER_SHARE = 0.18
_RESOLUTION = 2000
_CLASS_WIDTH = 0.16


@dataclass(frozen=True)
class Points:
    """Points of the data set.

    Attributes:
        xy: float32 [N, 2].
        labels: classes, int64 [N].
    """

    xy: Tensor
    labels: Tensor


@cache
def _arm() -> Tensor:
    """The arm as a fine polyline of equal pieces, standardized: float64 [R + 1, 2]."""
    angle = torch.linspace(0.0, 2.0 * math.pi * _TURNS, 20 * _RESOLUTION, dtype=torch.float64)
    radius = _INNER_SHARE + (1.0 - _INNER_SHARE) * angle / angle[-1]
    xy = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)
    length = torch.cat([torch.zeros(1, dtype=xy.dtype), xy.diff(dim=0).norm(dim=1).cumsum(0)])
    even = torch.linspace(0.0, float(length[-1]), _RESOLUTION + 1, dtype=xy.dtype)
    xy = xy[torch.searchsorted(length, even).clamp(max=len(xy) - 1)]
    xy = xy - xy.mean(dim=0)
    return xy * (math.sqrt(2.0) / float(xy.norm(dim=1).square().mean().sqrt()))


def point_at(position: Tensor) -> Tensor:
    """Points of the arm, float32 [N, 2].

    Args:
        position: s [N], in [0, 1].
    """
    arm = _arm()
    place = position.double().clamp(0.0, 1.0) * _RESOLUTION
    low = place.floor().long().clamp(max=_RESOLUTION - 1)
    share = (place - low)[:, None]
    return ((1.0 - share) * arm[low] + share * arm[low + 1]).float()


def nearest(xy: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest position on the arm to each point, and its distance.

    Args:
        xy: [N, 2].

    Returns:
        s in [0, 1] and the distance, both float64 [N]; exact to the pieces of the polyline, 0.004.
    """
    distance, index = torch.cdist(xy.double(), _arm()).min(dim=1)
    return index / _RESOLUTION, distance


def class_probabilities(position: Tensor) -> Tensor:
    """p(class | s), float64 [N, 3]: Gaussian bumps over the three thirds of the arm, normalized to sum 1."""
    centres = (torch.arange(NUM_CLASSES, dtype=torch.float64) + 0.5) / NUM_CLASSES
    return torch.softmax(-0.5 * ((position.double()[:, None] - centres) / _CLASS_WIDTH) ** 2, dim=1)


def data_set(count: int, seed: int) -> Points:
    """`count` points in order and evenly along the arm, with random classes of p(class | s).

    Args:
        count: N.
        seed: chooses positions (one in each of N equal pieces) and labels.
    """
    epoch, index = torch.zeros(count, dtype=torch.int64), torch.arange(count)
    chance = philox.uniform(philox.key(seed, "spiral data"), epoch, index, 2).double()
    position = (index + chance[:, 0]) / count
    labels = (chance[:, 1:] > class_probabilities(position).cumsum(dim=1)[:, :-1]).sum(dim=1)
    return Points(point_at(position), labels)
