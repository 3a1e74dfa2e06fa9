"""Precision, recall, density and coverage against cases by hand and against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm_cli.evaluation.manifolds import precision_recall_density_coverage


def features(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_shares_are_those_of_the_definitions() -> None:
    generated, real = features(40, 0), 1.5 * features(30, 1) + 0.5
    across = torch.cdist(generated, real, compute_mode="donot_use_mm_for_euclid_dist")

    def radii(x: Tensor, k: int) -> Tensor:
        return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").sort(1).values[:, k]

    expected = {
        "precision": (across <= radii(real, 3)).any(1).double().mean(),
        "recall": (across <= radii(generated, 3)[:, None]).any(0).double().mean(),
        "density": (across < radii(real, 5)).double().sum(1).mean() / 5,
        "coverage": (across < radii(real, 5)).any(0).double().mean(),
    }
    found = precision_recall_density_coverage(generated, real)
    assert found == pytest.approx({name: float(value) for name, value in expected.items()}, abs=1e-12)
    assert len(set(found.values())) == 4


def test_sets_far_apart_have_nothing_in_common() -> None:
    found = precision_recall_density_coverage(features(8, 0), features(9, 1) + 100)
    assert found == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}


def test_a_set_covers_itself() -> None:
    found = precision_recall_density_coverage(features(50, 0), features(50, 0))
    assert (found["precision"], found["recall"], found["coverage"]) == (1, 1, 1)
    assert found["density"] == pytest.approx(1)  # each ball holds its centre and four neighbours


def test_too_few_features_are_refused() -> None:
    with pytest.raises(ValueError, match="5 and 9 features, but more than 5"):
        precision_recall_density_coverage(features(5, 0), features(9, 1))
