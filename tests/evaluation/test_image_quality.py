"""PSNR and SSIM against closed forms and a slow, literal computation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ldm_cli.evaluation.image_quality import psnr, ssim


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_psnr_of_a_constant_error_is_known() -> None:
    image = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    worse = image.clone()
    worse[0] += 5
    worse[1, 0] += 10
    expected = [20 * math.log10(255 / 5), 20 * math.log10(255 / (10 / math.sqrt(3)))]
    assert psnr(worse, image).tolist() == pytest.approx(expected)
    assert psnr(image, worse).tolist() == pytest.approx(expected)  # 100 - 105 does not wrap around


def test_identical_images_count_as_100_db() -> None:
    image = noise(1, 3, 16, 16)
    assert psnr(image, image).tolist() == [100.0]
    assert ssim(image, image).tolist() == [1.0]


def test_ssim_of_constant_images_is_the_luminance_term() -> None:
    first, second = torch.full((1, 1, 12, 12), 100.0), torch.full((1, 1, 12, 12), 150.0)
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)
    assert ssim(first, second).item() == pytest.approx(expected, rel=1e-5)


def literal_ssim(x: Tensor, y: Tensor) -> float:
    """Wang et al. 2004, eq. 13 to 16, window by window."""
    axis = [math.exp(-((i - 5) ** 2) / (2 * 1.5**2)) for i in range(11)]
    weights = torch.tensor([[a * b for b in axis] for a in axis], dtype=torch.float64)
    weights /= weights.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for channel in range(x.shape[0]):
        for i in range(x.shape[1] - 10):
            for j in range(x.shape[2] - 10):
                a, b = (image[channel, i : i + 11, j : j + 11].double() for image in (x, y))
                mu_a, mu_b = float((weights * a).sum()), float((weights * b).sum())
                var_a = float((weights * (a - mu_a) ** 2).sum())
                var_b = float((weights * (b - mu_b) ** 2).sum())
                cov = float((weights * (a - mu_a) * (b - mu_b)).sum())
                values.append(
                    (2 * mu_a * mu_b + c1) * (2 * cov + c2) / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2))
                )
    return sum(values) / len(values)


def test_ssim_agrees_with_the_literal_formula() -> None:
    x = noise(2, 3, 14, 17)
    y = (0.7 * x.float() + 0.3 * noise(2, 3, 14, 17, seed=1).float()).round().to(torch.uint8)
    found = ssim(x, y)
    assert found.tolist() == pytest.approx([literal_ssim(a, b) for a, b in zip(x, y, strict=True)], abs=1e-6)
    assert 0.5 < found.mean() < 0.95


def test_ssim_of_independent_noise_is_small_and_of_the_negative_is_negative() -> None:
    x = noise(1, 1, 64, 64)
    assert abs(ssim(x, noise(1, 1, 64, 64, seed=1)).item()) < 0.1
    assert ssim(x, 255 - x).item() < -0.5


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="originals"):
        psnr(noise(1, 3, 8, 8), noise(2, 3, 8, 8))
    with pytest.raises(ValueError, match="window"):
        ssim(noise(1, 3, 10, 32), noise(1, 3, 10, 32))
