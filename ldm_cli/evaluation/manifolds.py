"""Precision, recall, density and coverage: which of two sets' features lie among the other's."""

from __future__ import annotations

import torch
from torch import Tensor

PRECISION_NEIGHBOR = 3
"""Neighbour that makes the radius for precision and recall, as published."""
DENSITY_NEIGHBOR = 5
"""The same for density and coverage."""

_CHUNK = 1024


def precision_recall_density_coverage(generated: Tensor, real: Tensor) -> dict[str, object]:
    """Shares of features within balls around the other set's features, each as large as the k-th neighbour is far.

    `precision` and `recall`: shares of generated features in a real ball, and of real ones in a generated ball, k = 3
    (Kynkäänniemi et al. 2019, arXiv:1904.06991, eq. 1–3). `density`: mean number of real balls around a generated
    feature, divided by k; `coverage`: share of real balls that hold a generated feature, k = 5 (Naeem et al. 2020,
    arXiv:2002.09797, eq. 3 and 5). A feature on the surface is within for the first two, not for the others.

    Args:
        generated, real: float [N, D], [M, D], more than 5 features each.

    Raises:
        ValueError: there are too few.
    """
    if min(len(generated), len(real)) <= DENSITY_NEIGHBOR:
        raise ValueError(f"{len(generated)} and {len(real)} features, but more than {DENSITY_NEIGHBOR} are needed")
    generated, real = generated.double(), real.double()
    radius, wide_radius = _radii(real)
    generated_radius, _ = _radii(generated)
    precise, counts = [], []
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    covered = recalled.clone()
    for part, own in zip(torch.split(generated, _CHUNK), torch.split(generated_radius, _CHUNK), strict=True):
        distances = _squared_distances(part, real)
        precise.append((distances <= radius).any(1))
        recalled |= (distances <= own[:, None]).any(0)
        inside = distances < wide_radius
        counts.append(inside.sum(1))
        covered |= inside.any(0)
    return {
        "precision": float(torch.cat(precise).double().mean()),
        "recall": float(recalled.double().mean()),
        "density": float(torch.cat(counts).double().mean()) / DENSITY_NEIGHBOR,
        "coverage": float(covered.double().mean()),
    }


def _radii(features: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances to the third and the fifth neighbour; a feature is not its own neighbour: [N] each."""
    nearest = [
        _squared_distances(part, features).topk(DENSITY_NEIGHBOR + 1, largest=False).values.sort(1).values
        for part in torch.split(features, _CHUNK)
    ]
    return torch.cat(nearest)[:, PRECISION_NEIGHBOR], torch.cat(nearest)[:, DENSITY_NEIGHBOR]


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp(min=0)
