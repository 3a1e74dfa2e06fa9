"""Measures how fast each deterministic sampler's error falls; `python -m tests.core.diffusion.order_of_accuracy`."""

import math

import torch

from ldm_cli.core.diffusion import exponential_samplers, samplers
from tests.core.diffusion import mixture

STEPS = (20, 40, 80, 160)


def no_noise(i):
    raise AssertionError("a deterministic sampler asked for noise")


# Name, order in theory, predictions per step, and the sampler over (denoise, x, path).
SAMPLERS = [
    ("ddim, euler", 1, 1, lambda d, x, p: samplers.euler(d, x, p, no_noise)),
    ("heun", 2, 2, samplers.heun),
    ("dpm2", 2, 2, samplers.dpm2),
    ("lms", 4, 1, samplers.lms),
    ("pndm", 2, 1, samplers.pndm),
    ("dpmpp_2m", 2, 1, lambda d, x, p: exponential_samplers.dpmpp_2m(d, x, p, no_noise)),
    ("dpmpp_2s_ancestral, eta 0", 2, 2, lambda d, x, p: exponential_samplers.dpmpp_2s(d, x, p, no_noise, 0.0)),
    ("dpmpp_sde, eta 0", 2, 2, lambda d, x, p: exponential_samplers.dpmpp_sde(d, x, p, no_noise, 0.0)),
    ("dpmpp_3m_sde, eta 0", 2, 1, lambda d, x, p: exponential_samplers.dpmpp_3m(d, x, p, no_noise, 0.0)),
    ("unipc", 3, 1, exponential_samplers.unipc),
    ("flow_euler", 1, 1, lambda d, x, p: samplers.euler(d, x, p, no_noise)),
    ("flow_heun", 2, 2, samplers.heun),
]


def errors(name, sampler):
    """Root mean square error over 41 points, for each of STEPS."""
    quantiles = torch.linspace(0.02, 0.98, 41, dtype=torch.float64)
    found = []
    for steps in STEPS:
        path = mixture.path(steps, flow=name.startswith("flow"))
        start, end = path.steps[0][0], path.steps[-1][1]
        x = start.signal * mixture.MEAN + start.noise * math.sqrt(2) * torch.erfinv(2 * quantiles - 1)
        found.append((sampler(mixture.denoise, x, path) - mixture.carried(x, start, end)).square().mean().sqrt().item())
    return found


def slope(found):
    """By how many powers of two the error falls when the steps double, over the last two doublings."""
    return math.log2(found[-3] / found[-1]) / 2


def table():
    """Markdown."""
    lines = [
        "| sampler | calls | " + " | ".join(map(str, STEPS)) + " | order | theory |",
        "|---|---|" + "---|" * (len(STEPS) + 2),
    ]
    for name, order, cost, sampler in SAMPLERS:
        found = errors(name, sampler)
        lines.append(
            f"| `{name.removesuffix(', eta 0').replace(', ', '`, `')}` | {cost} | "
            + " | ".join(f"{e:.1e}" for e in found)
            + f" | {slope(found):.1f} | {order} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
