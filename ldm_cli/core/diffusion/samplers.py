"""From noise to a sample: DDPM, DDIM, Euler and DPM-Solver++(2M), each over any network and any noise source.

All start from standard normal noise and return x_0. `a` is √ᾱ and `b` is √(1 − ᾱ), so that x_t = a x_0 + b ε;
σ = b / a. Coefficients are Python floats; they are applied in the type of the sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from ldm_cli.core.diffusion.prediction import to_epsilon, to_x0
from ldm_cli.core.diffusion.trajectory import Spacing, Trajectory

Denoiser = Callable[[Tensor, float], Tensor]
"""(x_t [B, …], t) → what the network predicts, [B, …]."""
NoiseSource = Callable[[int], Tensor]
"""Number of the step → standard normal noise [B, …], fresh for every step."""


def ddpm(
    model: Denoiser, noise: Tensor, trajectory: Trajectory, prediction_type: str, step_noise: NoiseSource
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2 and eq. 6-7, arXiv:2006.11239), of any number of steps.

    The noise added is the posterior's, given x_0 (`fixed_small` in diffusers); the last step adds none.

    Args:
        model: the network.
        noise: standard normal [B, …].
        trajectory: from `ddpm_trajectory`.
        prediction_type: what `model` predicts.
        step_noise: fresh noise of every step.
    """
    x = noise
    for i, (t, alpha, alpha_next) in enumerate(_steps(trajectory)):
        a, b = math.sqrt(alpha), math.sqrt(1.0 - alpha)
        x0 = to_x0(model(x, t), x, a, b, prediction_type)
        beta = 1.0 - alpha / alpha_next
        x0_share = math.sqrt(alpha_next) * beta / (1.0 - alpha)
        x_share = math.sqrt(alpha / alpha_next) * (1.0 - alpha_next) / (1.0 - alpha)
        deviation = math.sqrt(beta * (1.0 - alpha_next) / (1.0 - alpha))
        x = x0_share * x0 + x_share * x
        if deviation > 0.0:
            x = x + deviation * step_noise(i)
    return x


def ddim(
    model: Denoiser,
    noise: Tensor,
    trajectory: Trajectory,
    prediction_type: str,
    eta: float,
    step_noise: NoiseSource,
) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12 and 16, arXiv:2010.02502).

    Arguments as in `ddpm`, with `trajectory` from `ddim_trajectory`.

    Args:
        eta: η: 0 is deterministic and asks for no noise, 1 adds as much as DDPM.
    """
    x = noise
    for i, (t, alpha, alpha_next) in enumerate(_steps(trajectory)):
        a, b = math.sqrt(alpha), math.sqrt(1.0 - alpha)
        output = model(x, t)
        x0 = to_x0(output, x, a, b, prediction_type)
        epsilon = to_epsilon(output, x, a, b, prediction_type)
        variance = (1.0 - alpha_next) / (1.0 - alpha) * max(0.0, 1.0 - alpha / alpha_next)
        deviation = eta * math.sqrt(variance)
        x = math.sqrt(alpha_next) * x0 + math.sqrt(max(0.0, 1.0 - alpha_next - deviation**2)) * epsilon
        if deviation > 0.0:
            x = x + deviation * step_noise(i)
    return x


def euler(model: Denoiser, noise: Tensor, trajectory: Trajectory, prediction_type: str, spacing: Spacing) -> Tensor:
    """Euler's method on the probability-flow ODE dy/dσ = (y − x_0)/σ of y = x_t / a.

    This is algorithm 1 of Karras et al. 2022, arXiv:2206.00364, without its second-order correction.

    Arguments as in `ddpm`, with `trajectory` from `euler_trajectory`.

    Args:
        spacing: that of `trajectory`. `leading` starts from x = noise; the others reach the last level and
            start from y = σ · noise. So it is in diffusers.
    """
    alpha = trajectory.alpha_bars[0]
    y = noise * (math.sqrt(1.0 / alpha) if spacing == "leading" else math.sqrt(1.0 / alpha - 1.0))
    for t, alpha, alpha_next in _steps(trajectory):
        a, b = math.sqrt(alpha), math.sqrt(1.0 - alpha)
        x = a * y
        x0 = to_x0(model(x, t), x, a, b, prediction_type)
        # y + (σ' − σ) (y − x_0) / σ, written as the mean of y and x_0 that it is: no cancellation at large σ.
        kept = math.sqrt(1.0 / alpha_next - 1.0) / (b / a)
        y = kept * y + (1.0 - kept) * x0
    return y


def dpmpp_2m(model: Denoiser, noise: Tensor, trajectory: Trajectory, prediction_type: str) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2, arXiv:2211.01095).

    The first and the last step are first order.

    Arguments as in `ddpm`, with `trajectory` from `dpmpp_trajectory`.
    """
    x, x0_before, h_before = noise, noise, 0.0
    for i, (t, alpha, alpha_next) in enumerate(_steps(trajectory)):
        a, b = math.sqrt(alpha), math.sqrt(1.0 - alpha)
        a_next, b_next = math.sqrt(alpha_next), math.sqrt(1.0 - alpha_next)
        x0 = to_x0(model(x, t), x, a, b, prediction_type)
        # h is the step in λ = log(a / b); the last step ends at λ = ∞ and is plain x_0.
        h = math.log(a_next / b_next) - math.log(a / b) if b_next > 0.0 else math.inf
        direction = x0
        if 0 < i < len(trajectory) - 1:
            direction = x0 + (h / (2.0 * h_before)) * (x0 - x0_before)
        x = (b_next / b) * x - (a_next * math.expm1(-h)) * direction
        x0_before, h_before = x0, h
    return x


def _steps(trajectory: Trajectory) -> list[tuple[float, float, float]]:
    """(t, ᾱ, ᾱ') of every step."""
    return list(zip(trajectory.timesteps, trajectory.alpha_bars, trajectory.next_alpha_bars, strict=True))
