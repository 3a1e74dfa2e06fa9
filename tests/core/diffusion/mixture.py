"""A mixture of Gaussians, noised: its exact denoiser, and where the probability flow takes each point.

In one dimension the flow keeps the order of points and the share of mass below each, so that it is the map between
quantiles of two noised mixtures: an answer in closed form, without solving the equation.
"""

import math
from itertools import pairwise

import torch

from ldm_cli.core.diffusion.config import DiffusionConfig
from ldm_cli.core.diffusion.process import process_of
from ldm_cli.core.diffusion.timesteps import Timesteps

WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)
MEANS = torch.tensor([-1.0, 0.8], dtype=torch.float64)
DEVIATIONS = torch.tensor([0.3, 0.4], dtype=torch.float64)
MEAN = float((WEIGHTS * MEANS).sum())
SIGMA_MAX, SIGMA_MIN = 80.0, 0.1

DIFFUSION = process_of(DiffusionConfig())
FLOW = process_of(DiffusionConfig(prediction_type="flow_prediction"))


def denoise(x, level):
    """E[x_0 | x] for x = a x_0 + b ε, [N] → [N]."""
    spread = (level.signal * DEVIATIONS) ** 2 + level.noise**2
    difference = x[:, None] - level.signal * MEANS
    share = torch.softmax(WEIGHTS.log() - 0.5 * spread.log() - 0.5 * difference**2 / spread, dim=1)
    return (share * (MEANS + level.signal * DEVIATIONS**2 / spread * difference)).sum(1)


def below(x, level):
    """The mass below x."""
    deviations = ((level.signal * DEVIATIONS) ** 2 + level.noise**2).sqrt()
    return (WEIGHTS * 0.5 * (1.0 + torch.erf((x[:, None] - level.signal * MEANS) / deviations / math.sqrt(2.0)))).sum(1)


def carried(x, start, end):
    """Where the probability flow takes x, by bisection."""
    mass = below(x, start)
    low, high = torch.full_like(x, -50.0), torch.full_like(x, 50.0)
    for _ in range(100):
        middle = 0.5 * (low + high)
        is_low = below(middle, end) < mass
        low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
    return 0.5 * (low + high)


def path(num_steps, flow=False, sigma_max=SIGMA_MAX, sigma_min=SIGMA_MIN):
    """Levels from σ_max to σ_min > 0: Karras's, with equal differences of σ^(1/7); flow's, of b."""
    shares = [i / num_steps for i in range(num_steps + 1)]
    if flow:
        first, last = sigma_max / (1 + sigma_max), sigma_min / (1 + sigma_min)
        visited = [FLOW.at_sigma(s / (1 - s)) for s in (first + (last - first) * share for share in shares)]
        return Timesteps(tuple(pairwise(visited)), FLOW, straight=True)
    first, last = sigma_max ** (1 / 7), sigma_min ** (1 / 7)
    visited = [DIFFUSION.at_sigma((first + (last - first) * share) ** 7) for share in shares]
    return Timesteps(tuple(pairwise(visited)), DIFFUSION, straight=False)
