"""The Fréchet distance against closed forms, and the fit against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm_cli.evaluation.frechet import Gaussian, fit_gaussian, frechet_distance, frechet_name


def features(count: int, dim: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mixing + seed


def diagonal(mean: list[float], deviations: list[float]) -> Gaussian:
    return Gaussian(
        torch.tensor(mean, dtype=torch.float64),
        torch.tensor(deviations, dtype=torch.float64).square().diag(),
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
    with pytest.raises(ValueError, match="at least 2 are needed"):
        fit_gaussian(torch.ones(1, 3))
    with pytest.raises(ValueError, match="not finite"):
        fit_gaussian(torch.tensor([[torch.nan, 1.0]]))
    with pytest.raises(ValueError, match="2 features against 3"):
        frechet_distance(diagonal([0, 0], [1, 1]), diagonal([0, 0, 0], [1, 1, 1]))


def test_the_name_carries_the_network() -> None:
    assert frechet_name("0123456789abcdef") == "fd[01234567]"
