"""How fast errors fall as steps double, and what noise leaves behind, on mixtures with a closed-form denoiser."""

from pathlib import Path

import pytest
import torch

from ldm_cli.core.diffusion import exponential_samplers, samplers
from ldm_cli.core.diffusion.process import Level
from ldm_cli.core.diffusion.timesteps import Timesteps
from tests.core.diffusion import mixture, order_of_accuracy

PAGE = Path(__file__).parents[3] / "docs" / "samplers.md"

WEIGHTS = torch.tensor([0.4, 0.6], dtype=torch.float64)
MEANS = torch.tensor([[-1.0, 0.5], [0.8, -0.3]], dtype=torch.float64)
COVARIANCES = torch.tensor([[[0.3, 0.1], [0.1, 0.2]], [[0.2, -0.12], [-0.12, 0.4]]], dtype=torch.float64)
MEAN = WEIGHTS @ MEANS
COVARIANCE = torch.einsum("k,kij->ij", WEIGHTS, COVARIANCES + MEANS[:, :, None] * MEANS[:, None, :]) - MEAN.outer(MEAN)

STOCHASTIC = {
    "ddpm, ddim eta 1, euler_ancestral": lambda d, x, p, n: samplers.euler(d, x, p, n, 1.0),
    "ddim eta 0.5": lambda d, x, p, n: samplers.euler(d, x, p, n, 0.5),
    "dpmpp_2m_sde": lambda d, x, p, n: exponential_samplers.dpmpp_2m(d, x, p, n, 1.0),
    "dpmpp_2s_ancestral": exponential_samplers.dpmpp_2s,
    "dpmpp_sde": exponential_samplers.dpmpp_sde,
    "dpmpp_3m_sde": exponential_samplers.dpmpp_3m,
}


def denoise(x, level):
    """E[x_0 | x] for a mixture in two dimensions, [N, 2] → [N, 2]."""
    spread = level.signal**2 * COVARIANCES + level.noise**2 * torch.eye(2, dtype=x.dtype)
    difference = x[:, None] - level.signal * MEANS
    solved = torch.einsum("kij,nkj->nki", spread.inverse(), difference)
    log_density = WEIGHTS.log() - 0.5 * spread.logdet() - 0.5 * (difference * solved).sum(2)
    mean = MEANS + level.signal * torch.einsum("kij,nkj->nki", COVARIANCES, solved)
    return (torch.softmax(log_density, dim=1)[..., None] * mean).sum(1)


@pytest.mark.parametrize(
    ("name", "order", "cost", "sampler"), order_of_accuracy.SAMPLERS, ids=[row[0] for row in order_of_accuracy.SAMPLERS]
)
def test_error_of_a_deterministic_sampler_falls_with_its_order(name, order, cost, sampler):
    found = order_of_accuracy.errors(name, sampler)
    assert order_of_accuracy.slope(found) == pytest.approx(order, abs=0.3)
    assert found[-1] < 0.02


def test_the_table_in_the_documentation_is_what_is_measured():
    assert order_of_accuracy.table() in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "cost"), [(name, cost) for name, _, cost, _ in order_of_accuracy.SAMPLERS])
def test_a_step_costs_as_many_predictions_as_the_table_says(name, cost):
    sampler = next(sampler for other, _, _, sampler in order_of_accuracy.SAMPLERS if other == name)
    calls = []

    def counted(x, level):
        calls.append(level)
        return mixture.denoise(x, level)

    path = mixture.path(7, flow=name.startswith("flow"))
    sampler(counted, torch.zeros(1, dtype=torch.float64), path)
    assert len(calls) == 7 * cost + (name == "pndm")


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_stochastic_sampler_reproduces_mean_and_covariance(name):
    generator = torch.Generator().manual_seed(0)
    steps = mixture.path(150, sigma_min=0.01).steps
    path = Timesteps((*steps, (steps[-1][1], Level(0.0, 1.0, 0.0))), mixture.DIFFUSION, straight=False)
    draws = []

    def noise(i):
        draws.append(i)
        return torch.randn(6000, 2, generator=generator, dtype=torch.float64)

    x = STOCHASTIC[name](denoise, noise(-1), path, noise)
    torch.testing.assert_close(x.mean(0), MEAN, rtol=0, atol=0.04)
    torch.testing.assert_close(x.T.cov(), COVARIANCE, rtol=0, atol=0.05)
    assert len(set(draws)) == len(draws), "no noise is used twice"
    assert max(draws) >= 149
