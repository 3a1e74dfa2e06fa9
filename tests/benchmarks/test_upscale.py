"""The comparison of enlarged pictures with bicubic ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.upscale import distance_gain
from ldm_cli.evaluation.frechet import FeatureMoments


def moments(features: Tensor) -> FeatureMoments:
    found = FeatureMoments()
    found.add(features)
    return found


def test_the_gain_is_the_difference_of_two_distances_and_pictures_in_common_cancel() -> None:
    """Moving all features by δ is a distance of |δ|²; its error is 0, however far the pictures are spread."""
    real = 50 * torch.randn(60, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain, better = real + torch.tensor([3.0, 0.0, 0.0, 4.0]), real + torch.tensor([0.0, 2.0, 0.0, 0.0])
    found = distance_gain(moments(better), moments(plain), moments(real))
    assert found["frechet_distance_gain"] == pytest.approx(25.0 - 4.0, abs=1e-6)
    assert found["frechet_distance_gain_interval"] == pytest.approx([21.0, 21.0], abs=1e-6)
    swapped = distance_gain(moments(plain), moments(better), moments(real))
    assert swapped["frechet_distance_gain"] == pytest.approx(-21.0, abs=1e-6)


def test_a_difference_that_hangs_on_the_pictures_has_an_interval_around_it() -> None:
    generator = torch.Generator().manual_seed(1)
    real, noise = (torch.randn(200, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    found = distance_gain(moments(real), moments(real + 0.5 * noise), moments(real))
    gain, (low, high) = found["frechet_distance_gain"], found["frechet_distance_gain_interval"]  # type: ignore[misc]
    assert low < gain < high
    assert low > 0.01
