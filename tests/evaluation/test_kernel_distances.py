"""KID and CMMD against their definitions, and the interval of KID against many repetitions."""

from __future__ import annotations

import math
from itertools import permutations, product

import pytest
import torch
from torch import Tensor

from ldm_cli.evaluation.kernel_distances import clip_maximum_mean_discrepancy, kernel_inception_distance


def features(count: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed)) + shift


def kernel(x: Tensor, y: Tensor) -> float:
    return float((x.double() @ y.double() / 4 + 1) ** 3)


def test_kid_of_whole_sets_is_the_mean_over_pairs_of_different_pictures() -> None:
    x, y = features(6, 0), features(6, 1, shift=0.5)
    inside = sum(kernel(*pair) for z in (x, y) for pair in permutations(z, 2)) / (6 * 5)
    expected = inside - 2 * sum(kernel(a, b) for a, b in product(x, y)) / 36
    found = kernel_inception_distance(x, y)
    assert found["kid"] == pytest.approx(expected, rel=1e-9)
    assert (found["kid_std"], found["kid_interval"]) == (pytest.approx(0, abs=1e-12), None)
    assert found["kid_subset_size"] == 6


def test_subsets_are_those_of_torch_fidelity() -> None:
    # From torch-fidelity 0.4.0: kid_features_to_metric of these features with kid_subset_size=20.
    x = torch.sin(torch.arange(240.0)).view(60, 4)
    y = torch.cos(torch.arange(200.0) * 1.3).view(50, 4) + 0.1
    found = kernel_inception_distance(x, y, subset_size=20)
    assert (found["kid"], found["kid_std"]) == pytest.approx((0.009393749171779188, 0.11304176514671085), rel=1e-9)


def test_two_halves_of_one_set_are_no_distance_apart_on_average() -> None:
    values = []
    for seed in range(50):
        whole = features(80, seed)
        values.append(float(str(kernel_inception_distance(whole[:40], whole[40:], subset_size=20)["kid"])))
    found = torch.tensor(values)
    assert abs(float(found.mean())) < 3 * float(found.std()) / math.sqrt(50)


def test_the_interval_covers_the_distance_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm_cli.evaluation.kernel_distances.KID_SUBSETS", 30)  # which the interval takes into account
    # For independent standard normal x, x' of D = 4: E (x·x'/4 + 1)³ = 1 + 3 E(x·x')²/16 = 1.75. With y = y₀ + s,
    # s = (1, 1, 1, 1): E k(y, y') = E(u + 1)³ and E k(x, y) = E(v + 1)³, u = y·y'/4 and v = x·y/4, where
    # v | y is normal of variance |y|²/16, so E = 1 + 3 E|y|²/16 = 1 + 3·8/16 = 2.5, and
    # u | y' has mean Σy'/4 and variance |y'|²/16. With m = Σy'/4 normal of mean 1 and variance 1/4:
    # E (m + 1)³ = 8 + 3·2/4 = 9.5, and 3 E[(m + 1)|y'|²]/16 = 3 (2·8 + 4·2·1/4) / 16 = 3.375.
    truth, hits = 1.75 + (9.5 + 3.375) - 2 * 2.5, 0
    for seed in range(200):
        found = kernel_inception_distance(features(80, 2 * seed), features(80, 2 * seed + 1, 1.0), subset_size=20)
        low, high = found["kid_interval"]  # type: ignore[misc]
        hits += low <= truth <= high
    assert 180 <= hits <= 198


def test_cmmd_of_two_directions_is_known() -> None:
    one, other = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 0.5], [0.0, 2.0]])
    expected = 1000 * (2 - 2 * math.exp(-2 / 200))
    assert clip_maximum_mean_discrepancy(one, other)["cmmd"] == pytest.approx(expected, rel=1e-12)
    assert clip_maximum_mean_discrepancy(other, other)["cmmd"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("angle", [1e-5, 1.3e-5, 1.7e-5, 2.3e-5])  # of which float32 kernels would see nothing
def test_cmmd_keeps_its_digits_for_sets_that_are_close(angle: float) -> None:
    one, other = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[math.cos(angle), math.sin(angle)]]).double()
    squared = (2 * math.sin(angle / 2)) ** 2
    assert clip_maximum_mean_discrepancy(one, other)["cmmd"] == pytest.approx(1000 * squared / 100, rel=1e-5, abs=0)
