"""The Fréchet distance against closed forms, and the fit against its definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_cli.evaluation.frechet import (
    FeatureMoments,
    Gaussian,
    Moments,
    frechet_distance,
    frechet_estimates,
    frechet_name,
)
from ldm_cli.evaluation.intervals import jackknife


def features(count: int, dim: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mixing + seed


def fit_gaussian(x: Tensor) -> Gaussian:
    return Moments.of(x).gaussian


def diagonal(mean: list[float], deviations: list[float]) -> Gaussian:
    return Gaussian(
        torch.tensor(mean, dtype=torch.float64), torch.tensor(deviations, dtype=torch.float64).square().diag()
    )


def rotation(dim: int) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q


def test_distance_of_diagonal_gaussians_is_known() -> None:
    first, second = diagonal([0, 1, 2], [1, 2, 3]), diagonal([3, 1, 0], [2, 2, 0])
    expected = (9 + 0 + 4) + (1 - 2) ** 2 + (2 - 2) ** 2 + (3 - 0) ** 2
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-12)


def test_distance_to_itself_is_zero() -> None:
    for count in (500, 5):  # also where the covariance is singular
        gaussian = fit_gaussian(features(count, 20))
        assert frechet_distance(gaussian, gaussian) == pytest.approx(0, abs=1e-6 * float(gaussian.covariance.trace()))


def test_distance_does_not_change_under_rotation_and_exchange() -> None:
    x, y, q = features(200, 12), features(300, 12, seed=1), rotation(12)
    distance = frechet_distance(fit_gaussian(x), fit_gaussian(y))
    assert distance > 1
    assert frechet_distance(fit_gaussian(x @ q), fit_gaussian(y @ q)) == pytest.approx(distance, rel=1e-9)
    assert frechet_distance(fit_gaussian(y), fit_gaussian(x)) == pytest.approx(distance, rel=1e-9)


def test_distance_agrees_with_the_eigenvalues_of_the_product() -> None:
    a, b = fit_gaussian(features(200, 12)), fit_gaussian(features(300, 12, seed=1))
    # tr (Σ₁Σ₂)^½ is the sum of the roots of the eigenvalues of Σ₁Σ₂, which are real and not negative.
    roots = torch.linalg.eigvals(a.covariance @ b.covariance).sqrt().real.sum()
    expected = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * roots
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)


def test_a_shift_adds_its_square() -> None:
    x = features(200, 6)
    assert frechet_distance(fit_gaussian(x), fit_gaussian(x + 2)) == pytest.approx(6 * 4, rel=1e-8)


def test_a_fit_has_the_mean_and_the_unbiased_covariance() -> None:
    x = features(101, 7) + 1e6  # a mean that would swallow the digits of a sum of squares
    centred = x - x.sum(0) / 101
    gaussian = fit_gaussian(x)
    assert torch.allclose(gaussian.mean, x.sum(0) / 101, rtol=1e-14)
    assert torch.allclose(gaussian.covariance, torch.einsum("na,nb->ab", centred, centred) / 100, rtol=1e-7)
    assert fit_gaussian(torch.tensor([[1.0], [3.0]])).covariance.tolist() == [[2.0]]


def test_features_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(ValueError, match="1 feature vectors have no covariance; at least 2 are needed"):
        fit_gaussian(torch.ones(1, 3))
    with pytest.raises(ValueError, match="2 features against 3"):
        frechet_distance(diagonal([0, 0], [1, 1]), diagonal([0, 0, 0], [1, 1, 1]))


def test_the_name_carries_the_network() -> None:
    assert frechet_name("0123456789abcdef") == "fd[01234567]"


def moments(x: Tensor, batch: int = 1000) -> FeatureMoments:
    result = FeatureMoments()
    for part in x.split(batch):
        result.add(part)
    return result


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_moments_in_batches_are_those_of_the_whole(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm_cli.evaluation.frechet._CHUNK", 20)
    x = features(103, 5) + 1e4
    found, expected = moments(x, batch).whole.gaussian, fit_gaussian(x)
    assert torch.allclose(found.mean, expected.mean, rtol=1e-13)
    assert torch.allclose(found.covariance, expected.covariance, rtol=1e-8)


def test_a_group_left_out_is_every_tenth_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm_cli.evaluation.frechet._CHUNK", 20)
    x = features(103, 5)
    for group, found in enumerate(moments(x, 7).gaussians_without_a_group()):
        expected = fit_gaussian(x[torch.arange(103) % 10 != group])
        assert torch.allclose(found.mean, expected.mean, rtol=1e-10)
        assert torch.allclose(found.covariance, expected.covariance, rtol=1e-9)


def test_fid_is_the_distance_whatever_the_batches() -> None:
    x, y = features(60, 8), features(70, 8, seed=1)
    expected = frechet_distance(fit_gaussian(x), fit_gaussian(y))
    assert frechet_estimates(moments(x, 9), moments(y, 64))["fid"] == pytest.approx(expected, rel=1e-9)
    with_file = frechet_estimates(moments(x), fit_gaussian(y))
    assert with_file["fid"] == pytest.approx(expected, rel=1e-9)
    assert with_file["fid_interval"] != frechet_estimates(moments(x), moments(y))["fid_interval"]


def test_jackknife_of_a_mean_has_no_bias_and_the_known_error() -> None:
    values = torch.tensor([1.0, 4.0, 2.0, 8.0, 0.0])
    left_out = [float((values.sum() - value) / 4 - values.mean()) for value in values]
    bias, error = jackknife([left_out])
    assert bias == pytest.approx(0, abs=1e-6)
    assert error == pytest.approx(float(values.std()) / math.sqrt(5))


def test_intervals_cover_the_known_distance_as_often_as_they_say() -> None:
    # Of N(0, 1) and N(m, 1.5²) in each of 4 dimensions: 4 (m² + 0.5²).
    truth, hits, above = 4 * (0.3**2 + 0.5**2), 0, 0
    estimates: list[dict[str, Any]] = []
    generator = torch.Generator().manual_seed(3)
    for _ in range(200):
        x, y = torch.randn(300, 4, generator=generator), 1.5 * torch.randn(400, 4, generator=generator) + 0.3
        found: dict[str, Any] = frechet_estimates(moments(x), moments(y))
        low, high = found["fid_infinity_interval"]
        hits += low <= truth <= high
        above += found["fid"] > found["fid_infinity"]
        estimates.append(found)
    assert 180 <= hits <= 198
    # The other interval is for the distance that so many pictures have on average.
    average = sum(one["fid"] for one in estimates) / 200
    covered = [low <= average <= high for low, high in (one["fid_interval"] for one in estimates)]
    assert 180 <= sum(covered) <= 198
    assert above > 190  # few pictures make the distance too large


def test_distances_of_few_pictures_shrink_towards_the_limit() -> None:
    # Two sets of one distribution are no distance apart; those of 40 pictures in 10 dimensions seem to be.
    generator = torch.Generator().manual_seed(0)
    found = [
        frechet_estimates(
            moments(torch.randn(40, 10, generator=generator)), moments(torch.randn(4000, 10, generator=generator))
        )
        for _ in range(30)
    ]
    fid, limit = (sum(float(str(one[name])) for one in found) / 30 for name in ("fid", "fid_infinity"))
    assert fid > 0.5
    assert abs(limit) < 0.3 * fid


def test_there_is_no_interval_of_a_handful_of_pictures_or_of_two_files() -> None:
    x, y = features(19, 3), features(50, 3)
    none = {"fid_interval": None, "fid_infinity": None, "fid_infinity_interval": None}
    for found in (frechet_estimates(moments(x), moments(y)), frechet_estimates(fit_gaussian(x), fit_gaussian(y))):
        assert found == none | {"fid": found["fid"]}
