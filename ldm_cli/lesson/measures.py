"""The claims of the lesson in numbers: each caption has a measure here."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm_cli.core.diffusion.process import Level
from ldm_cli.lesson.spiral import NUM_CLASSES, class_probabilities, nearest


def best_x0(x: Tensor, level: Level, data: Tensor) -> Tensor:
    """E[x_0 | x_t], the best possible prediction for these data points, in closed form, float64 [B, 2].

    x_t = a x_0 + b ε makes p(x_0 = d_i | x_t) ∝ exp(−|x_t − a d_i|² / 2 b²); this is the mean of d_i under it
    (Karras et al. 2022, eq. 57, arXiv:2206.00364).

    Args:
        x: [B, 2].
        level: a and b.
        data: d, [N, 2].
    """
    x, data = x.double(), data.double()
    squares = torch.cdist(x, level.signal * data).square()
    return torch.softmax(-squares / (2.0 * level.noise**2), dim=1) @ data


def cosine(a: Tensor, b: Tensor) -> float:
    """Mean cosine of the angles between two sets of arrows, [N, 2] each."""
    return float(torch.cosine_similarity(a.double(), b.double(), dim=1).mean())


def directions(x: Tensor, x0: Tensor, level: Level, data: Tensor) -> dict[str, float]:
    """Mean cosines between arrows a x̂_0 − x at noised data points, the directions to predicted clean points.

    Args:
        x: x_t, [B, 2].
        x0: the network's x̂_0, [B, 2].
        level: of x.
        data: [N, 2].

    Returns:
        `learned_to_best`, `best_to_mean` (the arrow to the shrunken mean of all data) and `best_to_nearest` (to the
        shrunken data point nearest to x).
    """
    x, data = x.double(), data.double()
    best = level.signal * best_x0(x, level, data) - x
    closest = level.signal * data[torch.cdist(x, level.signal * data).argmin(dim=1)]
    return {
        "learned_to_best": cosine(level.signal * x0 - x, best),
        "best_to_mean": cosine(level.signal * data.mean(dim=0) - x, best),
        "best_to_nearest": cosine(closest - x, best),
    }


def describe(samples: Tensor, data: Tensor) -> dict[str, float]:
    """Compare samples [N, 2] with the data [M, 2].

    Returns:
        `distance_to_spiral`: mean distance to the arm. `spread`: root mean square distance from their own mean.
        `near_middle`: share of samples nearer to the middle than three quarters of the data. `arm_covered`: share of 20
        equal pieces of the arm with at least one nearest sample. `energy_distance`: squared, 0 for equal
        distributions (Székely & Rizzo 2013, eq. 5).
    """
    samples, data = samples.double(), data.double()
    position, distance = nearest(samples)
    pieces = (position * 20).long().clamp(max=19)
    inner = data.norm(dim=1).quantile(0.25)
    across, within, among = (torch.cdist(a, b).mean() for a, b in ((samples, data), (samples, samples), (data, data)))
    return {
        "distance_to_spiral": float(distance.mean()),
        "spread": float((samples - samples.mean(dim=0)).norm(dim=1).square().mean().sqrt()),
        "near_middle": float((samples.norm(dim=1) <= inner).double().mean()),
        "arm_covered": int((pieces.bincount(minlength=20) > 0).sum()) / 20,
        "energy_distance": float(2.0 * across - within - among),
    }


def describe_classes(samples: Tensor, labels: Tensor) -> dict[str, float]:
    """Compare samples [N, 2] with the classes [N] that they were generated for.

    Returns:
        `in_class`: share of samples for whose place on the arm their class is the most probable.
        `class_probability`: mean p(class | place). `class_spread`: mean over classes of the standard deviation of the
        position along the arm. `distance_to_spiral`: mean.
    """
    position, distance = nearest(samples)
    probability = class_probabilities(position)
    own = probability.gather(1, labels[:, None])[:, 0]
    spreads = [position[labels == label].std() for label in range(NUM_CLASSES)]
    return {
        "in_class": float((own >= probability.amax(dim=1)).double().mean()),
        "class_probability": float(own.mean()),
        "class_spread": float(torch.stack(spreads).mean()),
        "distance_to_spiral": float(distance.mean()),
    }
