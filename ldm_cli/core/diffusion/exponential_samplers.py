"""DPM-Solver++ and related samplers: exact in λ = log(a / b) for the linear part of ODE and SDE; x_0 is extrapolated.

With h = λ' − λ and η the share of the reverse process's noise (Lu et al. 2022, eq. 9 and 18, arXiv:2211.01095),

    x' = (b'/b) e^(−ηh) x + a' ∫ (1 + η) e^(−(1+η)(λ'−τ)) x_0(τ) dτ + b' √(1 − e^(−2ηh)) z.

The last step, to h = ∞, is x_0 itself. Arguments are those of `samplers.euler`.
"""

from __future__ import annotations

import math

from torch import Tensor

from ldm_cli.core.diffusion.process import Level
from ldm_cli.core.diffusion.samplers import CleanPredictor, NoiseSource, split, toward
from ldm_cli.core.diffusion.timesteps import Timesteps


def dpmpp_2m(
    denoise: CleanPredictor, x: Tensor, timesteps: Timesteps, step_noise: NoiseSource, eta: float = 0.0
) -> Tensor:
    """DPM-Solver++(2M), algorithm 2 of Lu et al. 2022; with η = 1 SDE-DPM-Solver++(2M), midpoint variant.

    The first and the last step are first order.
    """
    before, h_before = x, 0.0
    for i, (start, end) in enumerate(timesteps.steps):
        x0, h = denoise(x, start), end.log_snr - start.log_snr
        direction = x0
        if i > 0 and h < math.inf:
            direction = x0 + (0.5 * h / h_before) * (x0 - before)
        x = _decay(x, start, end, eta) - end.signal * math.expm1(-(1.0 + eta) * h) * direction
        x = _with_noise(x, h, end, eta, step_noise, i)
        before, h_before = x0, h
    return x


def dpmpp_3m(
    denoise: CleanPredictor, x: Tensor, timesteps: Timesteps, step_noise: NoiseSource, eta: float = 1.0
) -> Tensor:
    """DPM-Solver++(3M) with noise, as in k-diffusion: x_0 is a polynomial in λ through its last three values."""
    seen: list[tuple[float, Tensor]] = []
    for i, (start, end) in enumerate(timesteps.steps):
        x0, h = denoise(x, start), end.log_snr - start.log_snr
        decay = (1.0 + eta) * h
        x = _decay(x, start, end, eta) - end.signal * math.expm1(-decay) * x0
        seen = [(start.log_snr, x0), *seen][:3]
        if h < math.inf:
            first, second = _derivatives(seen, h)
            phi_2 = math.expm1(-decay) / decay + 1.0
            phi_3 = phi_2 / decay - 0.5
            if first is not None:
                x = x + end.signal * phi_2 * first
            if second is not None:
                x = x - end.signal * phi_3 * second
        x = _with_noise(x, h, end, eta, step_noise, i)
    return x


def dpmpp_2s(
    denoise: CleanPredictor, x: Tensor, timesteps: Timesteps, step_noise: NoiseSource, eta: float = 1.0
) -> Tensor:
    """DPM-Solver++(2S), algorithm 1 of Lu et al. 2022 with r = 1/2, to a lower level and up with fresh noise (η)."""
    for i, (start, end) in enumerate(timesteps.steps):
        down, up = split(start, end, eta)
        x0 = denoise(x, start)
        if down.noise > 0.0:
            middle = timesteps.process.at_sigma(math.sqrt(start.sigma * down.sigma))
            halfway = toward(x, x0, start, middle)
            x0 = denoise(halfway, middle)
        x = toward(x, x0, start, down)
        if up > 0.0:
            x = x + up * step_noise(i)
    return x


def dpmpp_sde(
    denoise: CleanPredictor, x: Tensor, timesteps: Timesteps, step_noise: NoiseSource, eta: float = 1.0
) -> Tensor:
    """SDE-DPM-Solver++(2S) with r = 1/2, as k-diffusion's `sample_dpmpp_sde`.

    Both stages of a step add increments of one Brownian motion in σ: over the first half-step, and over the whole, of
    which the first is a part. Their correlation is exact; increments of different steps are independent. Unlike a
    Brownian tree, other step counts do not refine the same timesteps.
    """
    for i, (start, end) in enumerate(timesteps.steps):
        x0 = denoise(x, start)
        if end.noise == 0.0:
            x = toward(x, x0, start, end)
            continue
        middle = timesteps.process.at_sigma(math.sqrt(start.sigma * end.sigma))
        (down, up), (down_end, up_end) = split(start, middle, eta), split(start, end, eta)
        halfway = toward(x, x0, start, down)
        first = step_noise(2 * i) if eta > 0.0 else None
        if first is not None:
            halfway = halfway + up * first
        x = toward(x, denoise(halfway, middle), start, down_end)
        if first is not None:
            share = (start.sigma - middle.sigma) / (start.sigma - end.sigma)
            x = x + up_end * (math.sqrt(share) * first + math.sqrt(1.0 - share) * step_noise(2 * i + 1))
    return x


def unipc(denoise: CleanPredictor, x: Tensor, timesteps: Timesteps) -> Tensor:
    """UniPC-2 with B(h) = e^h − 1, predicting x_0 (Zhao et al. 2023, algorithms 5-8, arXiv:2302.04867).

    The prediction at the end of a step also corrects the step, at no cost; the last step is first order, uncorrected.
    """
    before: Tensor | None = None
    h_before = 0.0
    corrected, x0 = x, denoise(x, timesteps.steps[0][0])
    for i, (start, end) in enumerate(timesteps.steps):
        h = end.log_snr - start.log_snr
        base, weight = (end.noise / start.noise) * corrected, -end.signal * math.expm1(-h)
        change = None if before is None or h == math.inf else (h / h_before) * (x0 - before)
        x = base + weight * (x0 if change is None else x0 + 0.5 * change)
        if i + 1 == len(timesteps):
            break
        ahead = denoise(x, timesteps.steps[i + 1][0])
        moments = _moments(h)
        if change is None:
            corrected = base + weight * (x0 + 0.5 * (ahead - x0))
        else:
            past = (moments[0] - moments[1]) / (1.0 + h_before / h)
            corrected = base + weight * (x0 + past * change + (moments[0] - past) * (ahead - x0))
        before, h_before, x0 = x0, h, ahead
    return x


def _moments(h: float) -> tuple[float, float]:
    """∫ over the step of its first and second power in λ, from 0 to 1, weighted with e^(−(1−λ)h) and normalized."""
    total = math.expm1(-h)
    first = (-total / h - 1.0) / total
    return first, 2.0 * ((total / h + 1.0) / h - 0.5) / total


def _derivatives(seen: list[tuple[float, Tensor]], h: float) -> tuple[Tensor | None, Tensor | None]:
    """h · dx_0/dλ and h² · d²x_0/dλ² / 2 at the latest of up to three (λ, x_0), newest first; None if too few."""
    if len(seen) < 2:
        return None, None
    slope = (seen[0][1] - seen[1][1]) * (h / (seen[0][0] - seen[1][0]))
    if len(seen) < 3:
        return slope, None
    older = (seen[1][1] - seen[2][1]) * (h / (seen[1][0] - seen[2][0]))
    curve = (slope - older) * (h / (seen[0][0] - seen[2][0]))
    return slope + curve * ((seen[0][0] - seen[1][0]) / h), curve


def _decay(x: Tensor, start: Level, end: Level, eta: float) -> Tensor:
    """(b'/b) e^(−ηh) x, where e^(−h) is σ'/σ."""
    return (end.noise / start.noise * math.pow(end.sigma / start.sigma, eta)) * x


def _with_noise(x: Tensor, h: float, end: Level, eta: float, step_noise: NoiseSource, i: int) -> Tensor:
    if eta == 0.0 or end.noise == 0.0:
        return x
    return x + end.noise * math.sqrt(-math.expm1(-2.0 * eta * h)) * step_noise(i)
