"""From noise to a sample: one short function per method, each for any prediction of x_0, any levels and any noise.

The network is a function that predicts x_0 for x = a x_0 + b ε at a level. The methods start from x, noise at the
first level, and return x where the last step ends, which is x_0. Most of them repeat one move, `toward`: with x_0 held
fixed, the probability-flow ODE is solved exactly by

    x' = (b'/b) x + (a' − a b'/b) x_0,

whatever a and b. DDIM, Euler's method on σ, Euler's method on a flow and the first order of DPM-Solver++ all are this
move; they differ in the levels they visit. The stiff solvers built of exponential integrators are in
`exponential_samplers`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from ldm_cli.core.diffusion.prediction import SAMPLE, Prediction
from ldm_cli.core.diffusion.process import Level
from ldm_cli.core.diffusion.timesteps import Timesteps

UnconditionalNetwork = Callable[[Tensor, float], Tensor]
"""(x_t [B, …], its time) → the network's prediction, [B, …]."""
CleanPredictor = Callable[[Tensor, Level], Tensor]
"""(x [B, …], its level) → x_0, [B, …]."""
NoiseSource = Callable[[int], Tensor]
"""Number of the draw → standard normal noise [B, …]. Sampler step i draws i; `dpmpp_sde`, with two, 2 i and 2 i + 1."""

_LMS_ORDER = 4


def clean_predictor(network: UnconditionalNetwork, prediction: Prediction) -> CleanPredictor:
    """The network as a function that predicts x_0.

    Args:
        network: takes x and the time `Level.t`.
    """
    return lambda x, level: prediction.x0(network(x, level.t), x, level.signal, level.noise)


def toward(x: Tensor, x0: Tensor, start: Level, end: Level) -> Tensor:
    """x at `end` if x_0 stays what it is at `start`; of x's shape."""
    kept = end.noise / start.noise
    return kept * x + (end.signal - start.signal * kept) * x0


def split(start: Level, end: Level, eta: float) -> tuple[Level, float]:
    """The level to step down to, and the deviation of fresh noise that leads up again to `end`.

    η = 1 adds as much as the reverse process has, that of DDPM's posterior given x_0 (Song et al. 2021, eq. 16,
    arXiv:2010.02502; k-diffusion's ancestral step is the same in σ); 0 adds none.
    """
    ratio = end.noise * start.signal / (end.signal * start.noise)
    up = min(end.noise, eta * end.noise * math.sqrt(max(0.0, 1.0 - ratio**2)))
    return Level(end.t, end.signal, math.sqrt(max(0.0, end.noise**2 - up**2))), up


def euler(
    denoise: CleanPredictor, x: Tensor, timesteps: Timesteps, step_noise: NoiseSource, eta: float = 0.0
) -> Tensor:
    """Five published samplers in one, by η and by levels.

    DDIM (Song et al. 2021, eq. 12, arXiv:2010.02502); DDPM, algorithm 2 of Ho et al. 2020, arXiv:2006.11239, with the
    variance of the posterior (`fixed_small` in diffusers), is η = 1; Euler's method, algorithm 1 of Karras et al. 2022,
    arXiv:2206.00364, without its correction, is η = 0, on diffusion and flow alike, and k-diffusion's Euler ancestral
    η = 1.

    Args:
        denoise: predicts x_0.
        x: noise at the first level, [B, …].
        step_noise: fresh noise of every step; not asked for where none is added.
        eta: η in [0, 1].
    """
    for i, (start, end) in enumerate(timesteps.steps):
        down, up = split(start, end, eta)
        x = toward(x, denoise(x, start), start, down)
        if up > 0.0:
            x = x + up * step_noise(i)
    return x


def heun(denoise: CleanPredictor, x: Tensor, timesteps: Timesteps) -> Tensor:
    """Heun's method on dz/ds = (z − x_0) / s (Karras et al. 2022, algorithm 1, arXiv:2206.00364).

    A step to s = 0 is Euler's. Arguments as in `euler`.
    """
    for start, end in timesteps.steps:
        x0 = denoise(x, start)
        if end.noise > 0.0:
            ahead = toward(x, x0, start, end)
            slope, other = _slope(x, x0, timesteps, start), _slope(ahead, denoise(ahead, end), timesteps, end)
            x0 = _along(x0, slope, 0.5 * (slope + other), timesteps, start)
        x = toward(x, x0, start, end)
    return x


def dpm2(denoise: CleanPredictor, x: Tensor, timesteps: Timesteps) -> Tensor:
    """The midpoint method, midway in log s (DPM-Solver-2 of Karras et al. 2022, as in k-diffusion).

    A step to s = 0 is Euler's. Arguments as in `euler`.
    """
    for start, end in timesteps.steps:
        x0 = denoise(x, start)
        if end.noise > 0.0:
            middle = timesteps.between(start, end)
            halfway = toward(x, x0, start, middle)
            slope, other = _slope(x, x0, timesteps, start), _slope(halfway, denoise(halfway, middle), timesteps, middle)
            x0 = _along(x0, slope, other, timesteps, start)
        x = toward(x, x0, start, end)
    return x


def lms(denoise: CleanPredictor, x: Tensor, timesteps: Timesteps) -> Tensor:
    """Linear multistep: the polynomial through the last four slopes dz/ds, integrated (Adams & Bashforth; k-diffusion).

    Arguments as in `euler`.
    """
    slopes: list[Tensor] = []
    nodes: list[float] = []
    for start, end in timesteps.steps:
        x0 = denoise(x, start)
        s, s_end = timesteps.coordinates(start)[0], timesteps.coordinates(end)[0]
        slope = _slope(x, x0, timesteps, start)
        slopes, nodes = [slope, *slopes][:_LMS_ORDER], [s, *nodes][:_LMS_ORDER]
        mean = _combined(_mean_lagrange(nodes, s, s_end), slopes)
        x = toward(x, _along(x0, slope, mean, timesteps, start), start, end)
    return x


def pndm(denoise: CleanPredictor, x: Tensor, timesteps: Timesteps) -> Tensor:
    """Pseudo linear multistep, as Stable Diffusion's PLMS (Liu et al. 2022, eq. 11-13, arXiv:2202.09778).

    The network's output, ε or v, is extrapolated from the last four in t; the first step takes the mean of the outputs
    at both its ends, and so one more prediction. Steps should be equally long in t, and the first level must hold
    signal. Arguments as in `euler`.
    """
    prediction = timesteps.process.prediction

    def output(x0: Tensor, x: Tensor, level: Level) -> Tensor:
        epsilon = SAMPLE.epsilon(x0, x, level.signal, level.noise)
        return prediction.target(x0, epsilon, level.signal, level.noise)

    outputs: list[Tensor] = []
    for i, (start, end) in enumerate(timesteps.steps):
        x0 = denoise(x, start)
        outputs = [output(x0, x, start), *outputs][:4]
        mean = _combined(_ADAMS_BASHFORTH[len(outputs)], outputs)
        if i == 0 and len(timesteps) > 1:
            ahead, following = toward(x, x0, start, end), timesteps.steps[1][0]
            mean = 0.5 * (mean + output(denoise(ahead, following), ahead, following))
        x = toward(x, prediction.x0(mean, x, start.signal, start.noise), start, end)
    return x


def lcm(denoise: CleanPredictor, x: Tensor, timesteps: Timesteps, step_noise: NoiseSource) -> Tensor:
    """Multistep sampling of a latent consistency model (Luo et al. 2023, algorithm 3, arXiv:2310.04378).

    Each step goes to x_0 and up again with fresh noise. Arguments as in `euler`.
    """
    for i, (start, end) in enumerate(timesteps.steps):
        # The boundary condition that makes t = 0 the identity, with the constants of the distillation.
        scaled, data = 10.0 * start.t, 0.5
        skip, out = data**2 / (scaled**2 + data**2), scaled / math.sqrt(scaled**2 + data**2)
        x = out * denoise(x, start) + skip * x
        if end.noise > 0.0:
            x = end.signal * x + end.noise * step_noise(i)
    return x


_ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def _slope(x: Tensor, x0: Tensor, timesteps: Timesteps, level: Level) -> Tensor:
    """dz/ds = (z − x_0) / s."""
    s, scale = timesteps.coordinates(level)
    return (x / scale - x0) / s


def _along(x0: Tensor, slope: Tensor, mean: Tensor, timesteps: Timesteps, start: Level) -> Tensor:
    """The x_0 for which `toward` moves along `mean`: z − s · mean, without the difference of large numbers."""
    return x0 + timesteps.coordinates(start)[0] * (slope - mean)


def _combined(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """Σ weights · tensors."""
    total = weights[0] * tensors[0]
    for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
        total = total + weight * tensor
    return total


def _mean_lagrange(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """Mean over [start, end] of the Lagrange polynomials on at most four nodes; two-point Gauss is exact for cubics."""
    middle, half = 0.5 * (start + end), 0.5 * (end - start) / math.sqrt(3.0)

    def basis(k: int, s: float) -> float:
        return math.prod((s - node) / (nodes[k] - node) for j, node in enumerate(nodes) if j != k)

    return [0.5 * (basis(k, middle - half) + basis(k, middle + half)) for k in range(len(nodes))]
