"""Against k-diffusion's published algorithms, written anew in their variables y = x / a and σ = b / a, in float64."""

import math
from itertools import pairwise

import pytest
import torch

from ldm_cli.core.diffusion import exponential_samplers, samplers
from ldm_cli.core.diffusion.config import DiffusionConfig
from ldm_cli.core.diffusion.process import process_of
from ldm_cli.core.diffusion.spacing import SigmaSpacing
from ldm_cli.core.diffusion.timesteps import euler_timesteps

PROCESS = process_of(DiffusionConfig())
SHAPE = (3, 5)


def model(y, sigma):
    """A denoiser that is smooth, nonlinear and the identity without noise."""
    return (y + sigma * torch.tanh(y.roll(1, -1) / (1 + sigma)) + sigma**2 * torch.sin(y / (1 + sigma))) / (
        1 + sigma**2
    )


def noise(i):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(i + 10), dtype=torch.float64)


def ancestral(sigma, lower, eta):
    """σ to step down to, and the deviation of the noise that leads up to `lower`."""
    up = min(lower, eta * math.sqrt(lower**2 * (sigma**2 - lower**2) / sigma**2))
    return math.sqrt(lower**2 - up**2), up


def euler(y, sigmas, eta):
    for i, (sigma, lower) in enumerate(pairwise(sigmas)):
        down, up = ancestral(sigma, lower, eta)
        y = y + (down - sigma) * (y - model(y, sigma)) / sigma + up * noise(i)
    return y


def heun(y, sigmas, eta):
    for sigma, lower in pairwise(sigmas):
        d = (y - model(y, sigma)) / sigma
        ahead = y + (lower - sigma) * d
        if lower > 0:
            d = (d + (ahead - model(ahead, lower)) / lower) / 2
        y = y + (lower - sigma) * d
    return y


def dpm2(y, sigmas, eta):
    for sigma, lower in pairwise(sigmas):
        d = (y - model(y, sigma)) / sigma
        if lower > 0:
            middle = math.exp((math.log(sigma) + math.log(lower)) / 2)
            halfway = y + (middle - sigma) * d
            d = (halfway - model(halfway, middle)) / middle
        y = y + (lower - sigma) * d
    return y


def lms(y, sigmas, eta):
    seen = []
    for i, (sigma, lower) in enumerate(pairwise(sigmas)):
        seen.append((y - model(y, sigma)) / sigma)
        order = min(i + 1, 4)
        nodes = torch.tensor(sigmas[i - order + 1 : i + 1], dtype=torch.float64)
        # The polynomial through the slopes by its coefficients, and its antiderivative.
        powers = torch.arange(order, dtype=torch.float64)
        coefficients = torch.linalg.solve(nodes[:, None] ** powers, torch.stack(seen[-order:]).flatten(1))
        integral = (lower ** (powers + 1) - sigma ** (powers + 1)) / (powers + 1)
        y = y + (integral @ coefficients).reshape(SHAPE)
    return y


def multistep(order):
    def sample(y, sigmas, eta):
        seen, steps = [], []
        for i, (sigma, lower) in enumerate(pairwise(sigmas)):
            seen.append(model(y, sigma))
            if lower == 0:
                y = seen[-1]
                continue
            h = math.log(sigma / lower)
            total = h * (1 + eta)
            y = math.exp(-total) * y + (1 - math.exp(-total)) * seen[-1]
            if order == 2 and steps:
                y = y + 0.5 * (1 - math.exp(-total)) * h / steps[-1] * (seen[-1] - seen[-2])
            elif order == 3 and steps:
                phi_2 = (math.exp(-total) - 1) / total + 1
                d = (seen[-1] - seen[-2]) * h / steps[-1]
                if len(steps) > 1:
                    r0, r1 = steps[-1] / h, steps[-2] / h
                    older = (seen[-2] - seen[-3]) / r1
                    curve = (d - older) / (r0 + r1)
                    y = y + phi_2 * (d + (d - older) * r0 / (r0 + r1)) - (phi_2 / total - 0.5) * curve
                else:
                    y = y + phi_2 * d
            y = y + lower * math.sqrt(1 - math.exp(-2 * eta * h)) * noise(i)
            steps.append(h)
        return y

    return sample


def dpmpp_2s(y, sigmas, eta):
    for i, (sigma, lower) in enumerate(pairwise(sigmas)):
        down, up = ancestral(sigma, lower, eta)
        x0 = model(y, sigma)
        if down > 0:
            h = math.log(sigma / down)
            halfway = math.exp(-h / 2) * y + (1 - math.exp(-h / 2)) * x0
            x0 = model(halfway, sigma * math.exp(-h / 2))
            y = math.exp(-h) * y + (1 - math.exp(-h)) * x0
        else:
            y = x0
        y = y + up * noise(i)
    return y


def dpmpp_sde(y, sigmas, eta):
    for i, (sigma, lower) in enumerate(pairwise(sigmas)):
        x0 = model(y, sigma)
        if lower == 0:
            y = x0
            continue
        middle = math.sqrt(sigma * lower)
        # Increments of one Brownian motion W(σ), each over its deviation.
        first = math.sqrt(sigma - middle) * noise(2 * i)
        second = math.sqrt(middle - lower) * noise(2 * i + 1)
        down, up = ancestral(sigma, middle, eta)
        halfway = down / sigma * y + (1 - down / sigma) * x0 + up * first / math.sqrt(sigma - middle)
        down, up = ancestral(sigma, lower, eta)
        y = down / sigma * y + (1 - down / sigma) * model(halfway, middle)
        y = y + up * (first + second) / math.sqrt(sigma - lower)
    return y


PAIRS = {
    "euler": (samplers.euler, euler),
    "heun": (lambda d, x, p, n, e: samplers.heun(d, x, p), heun),
    "dpm2": (lambda d, x, p, n, e: samplers.dpm2(d, x, p), dpm2),
    "lms": (lambda d, x, p, n, e: samplers.lms(d, x, p), lms),
    "dpmpp_2m": (exponential_samplers.dpmpp_2m, multistep(2)),
    "dpmpp_3m": (exponential_samplers.dpmpp_3m, multistep(3)),
    "dpmpp_2s": (exponential_samplers.dpmpp_2s, dpmpp_2s),
    "dpmpp_sde": (exponential_samplers.dpmpp_sde, dpmpp_sde),
}


@pytest.mark.parametrize("steps", [1, 2, 3, 12])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("spacing", [SigmaSpacing("karras"), "linspace"])
@pytest.mark.parametrize("name", PAIRS)
def test_trajectory_equals_that_of_the_algorithm_in_sigma(name, spacing, eta, steps):
    ours, theirs = PAIRS[name]
    path = euler_timesteps(PROCESS, steps, spacing, 0)
    sigmas = [start.sigma for start, _ in path.steps] + [0.0]
    visited = []

    def denoise(x, level):
        visited.append(level)
        return model(x / level.signal, level.sigma)

    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = ours(denoise, path.start_scale * start, path, noise, eta)
    torch.testing.assert_close(x, theirs(sigmas[0] * start, sigmas, eta), rtol=0, atol=1e-9)
    assert all(0 <= level.t <= 999 for level in visited)
    assert 0.01 < x.abs().max() < 100


@pytest.mark.parametrize("sigma", [0.03, 0.2, 1.0, 5.0, 14.0])
def test_the_level_of_a_sigma_is_found_again_by_its_t(sigma):
    level = PROCESS.at_sigma(sigma)
    assert level.sigma == pytest.approx(sigma, rel=1e-12)
    assert level.signal**2 + level.noise**2 == pytest.approx(1, rel=1e-12)
    assert PROCESS.at_time(level.t).sigma == pytest.approx(sigma, rel=1e-2)
