"""Levels that training visits: each distribution against its closed form and its inverse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_cli import philox
from ldm_cli.core.diffusion.config import MAX_MODE_SCALE, DiffusionConfig
from ldm_cli.core.diffusion.level_distribution import random_levels
from ldm_cli.core.diffusion.loss import add_noise, diffusion_loss
from ldm_cli.core.diffusion.process import process_of

NUMBER = 2**16
KEY = philox.key(3, "levels")


def levels(**config: Any) -> Tensor:
    position = torch.arange(NUMBER)
    return random_levels(DiffusionConfig(**config), KEY, torch.zeros_like(position), position)


def mode_inverse(u: Tensor, scale: float) -> Tensor:
    """The w of Esser et al. 2024, eq. 20, by bisection of their own form: u = 1 − v − s (cos²(π v / 2) − 1 + v)."""
    low, high = torch.zeros_like(u), torch.ones_like(u)
    for _ in range(60):
        v = (low + high) / 2
        is_below = 1 - v - scale * (torch.cos(math.pi / 2 * v) ** 2 - 1 + v) > u
        low, high = torch.where(is_below, v, low), torch.where(is_below, high, v)
    return 1 - low


DISTRIBUTIONS = [
    ({}, lambda u: u),
    ({"timestep_sampling": "logit_normal"}, lambda u: torch.special.ndtr(torch.logit(u))),
    (
        {"timestep_sampling": "logit_normal", "logit_mean": 0.5, "logit_std": 0.6},
        lambda u: torch.special.ndtr((torch.logit(u) - 0.5) / 0.6),
    ),
    ({"timestep_sampling": "mode", "mode_scale": 1.29}, lambda u: mode_inverse(u, 1.29)),
    ({"timestep_sampling": "mode", "mode_scale": -0.8}, lambda u: mode_inverse(u, -0.8)),
    ({"timestep_sampling": "cosmap"}, lambda u: torch.atan(u / (1 - u)) * 2 / math.pi),
]
"""Each with its distribution function: the share of levels below u."""


@pytest.mark.parametrize(("config", "share_below"), DISTRIBUTIONS)
def test_a_distribution_function_makes_its_levels_uniform(config: dict[str, Any], share_below: Any) -> None:
    ranks = share_below(levels(**config).double()).sort().values
    largest = (ranks - (torch.arange(NUMBER) + 0.5) / NUMBER).abs().max().item()
    assert largest < 1.63 / math.sqrt(NUMBER), "Kolmogorov and Smirnov's bound of 1 %"


def logit_normal_density(u: Tensor) -> Tensor:
    return torch.exp(-(torch.logit(u) ** 2) / 2) / (math.sqrt(2 * math.pi) * u * (1 - u))


@pytest.mark.parametrize(
    ("name", "density"),
    [
        ("logit_normal", logit_normal_density),
        ("cosmap", lambda u: 2 / (math.pi - 2 * math.pi * u + 2 * math.pi * u**2)),
    ],
)
def test_a_histogram_of_levels_is_the_density_of_the_paper(name: str, density: Any) -> None:
    counts = torch.histc(levels(timestep_sampling=name), bins=32, min=0, max=1).double() / NUMBER
    fine = (torch.arange(32 * 64, dtype=torch.float64) + 0.5) / (32 * 64)
    expected = density(fine).view(32, 64).mean(dim=1) / 32
    torch.testing.assert_close(counts, expected, atol=5 / math.sqrt(32 * NUMBER), rtol=0)


def test_cosmap_visits_the_levels_of_a_cosine_schedule() -> None:
    """For uniform w: b / a = u / (1 − u) = tan(π w / 2), so that log SNR = −2 log tan(π w / 2)."""
    u, w = levels(timestep_sampling="cosmap").double(), levels().double()
    tangent = torch.tan(math.pi / 2 * w)
    torch.testing.assert_close(u, tangent / (1 + tangent), rtol=0, atol=1e-6)


def test_mode_of_scale_zero_is_uniform_and_no_scale_leaves_the_range() -> None:
    assert torch.equal(levels(timestep_sampling="mode", mode_scale=0.0), levels())
    for scale in (-1.0, MAX_MODE_SCALE):
        u = levels(timestep_sampling="mode", mode_scale=scale)
        assert 0 < u.min() < u.max() <= 1
        order = levels().argsort()
        assert bool((u[order].diff() >= -1e-6).all()), "a level rises with its random number"


def test_levels_do_not_depend_on_the_batch_that_they_are_in() -> None:
    config = DiffusionConfig(timestep_sampling="mode")
    position = torch.tensor([5, 900])
    assert torch.equal(
        random_levels(config, KEY, torch.zeros_like(position), position), levels(timestep_sampling="mode")[position]
    )


def test_a_shift_moves_every_level_as_in_the_paper_and_one_is_the_plain_path() -> None:
    u = levels(timestep_sampling="logit_normal").double()
    plain, shifted = (
        process_of(DiffusionConfig(prediction_type="flow_prediction", flow_shift=shift)).at(u) for shift in (1.0, 3.0)
    )
    assert torch.equal(plain[1], u)
    assert torch.equal(shifted[1], 3 * u / (1 + 2 * u))


def test_the_loss_of_a_flow_is_the_weighted_noise_error_of_the_paper() -> None:
    """Eq. 12: ½ w λ' ‖ε − ε̂‖² with w = t / (1 − t) and λ' = 2 / (t (1 − t)), where ε̂ follows from the velocity."""
    generator = torch.Generator().manual_seed(0)
    x0, noise, output = (torch.randn(64, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    t = torch.rand(64, generator=generator, dtype=torch.float64) * 0.98 + 0.01
    process = process_of(DiffusionConfig(prediction_type="flow_prediction"))
    a, b, _ = process.at(t)
    x = add_noise(x0, noise, a, b)
    predicted = process.prediction.epsilon(output, x, a[:, None], b[:, None])
    weight = 0.5 * (t / (1 - t)) * 2 / (t * (1 - t))
    expected = weight * (predicted - noise).square().mean(dim=1)
    loss = diffusion_loss(process.prediction, output, x0, noise, a, b)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
