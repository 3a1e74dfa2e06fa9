"""Which noise levels a sampler visits: the three time spacings in use, and what each sampler makes of them.

Spacings are those of Lin et al. 2023, table 2, arXiv:2305.08891; the numbers equal those of the diffusers
scheduler of the same sampler, also where two of them differ for no good reason: pictures can be compared.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ldm_cli.core.diffusion.schedule import NoiseSchedule

Spacing = Literal["leading", "linspace", "trailing"]

# Samplers in σ-space cannot start at infinite σ: zero signal counts as this ᾱ, the least positive float16.
_LEAST_ALPHA_BAR = 2.0**-24


@dataclass(frozen=True)
class Trajectory:
    """The levels of one sampling run, from noise to image; the three sequences have one entry per step.

    Attributes:
        timesteps: t that the network is told, falling; fractions lie between two training levels.
        alpha_bars: ᾱ at the start of each step, in [0, 1).
        next_alpha_bars: ᾱ at the end of each step, in (0, 1].
    """

    timesteps: tuple[float, ...]
    alpha_bars: tuple[float, ...]
    next_alpha_bars: tuple[float, ...]

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.timesteps)


def ddpm_trajectory(schedule: NoiseSchedule, num_steps: int, spacing: Spacing, offset: int) -> Trajectory:
    """Each step ends where the next begins, the last at ᾱ = 1.

    Args:
        schedule: the training levels.
        num_steps: network evaluations, 1 … T.
        spacing: which levels are visited.
        offset: added to every level when spacing is `leading`.

    Raises:
        ValueError: more steps than levels.
    """
    timesteps = _spaced(schedule.num_timesteps, num_steps, spacing, offset)
    alphas = [float(schedule.alphas_cumprod[t]) for t in timesteps]
    return Trajectory(tuple(map(float, timesteps)), tuple(alphas), (*alphas[1:], 1.0))


def ddim_trajectory(
    schedule: NoiseSchedule, num_steps: int, spacing: Spacing, offset: int, set_alpha_to_one: bool
) -> Trajectory:
    """Each step ends T // num_steps levels below its start, or below level 0: at ᾱ = 1 or ᾱ_0.

    With `linspace` and `trailing` that end is not quite where the next step begins: so it is in diffusers.
    Arguments and errors as in `ddpm_trajectory`.

    Args:
        set_alpha_to_one: whether the last step ends at ᾱ = 1 or at ᾱ_0.
    """
    timesteps = _spaced(schedule.num_timesteps, num_steps, spacing, offset)
    alphas = schedule.alphas_cumprod.tolist()
    last = 1.0 if set_alpha_to_one else alphas[0]
    stride = schedule.num_timesteps // num_steps
    ends = tuple(alphas[t - stride] if t >= stride else last for t in timesteps)
    return Trajectory(tuple(map(float, timesteps)), tuple(alphas[t] for t in timesteps), ends)


def euler_trajectory(schedule: NoiseSchedule, num_steps: int, spacing: Spacing, offset: int) -> Trajectory:
    """As DDPM's, but `linspace` falls on fractions of levels, with σ interpolated.

    Arguments and errors as in `ddpm_trajectory`.
    """
    if spacing == "linspace":
        return _by_sigma(schedule, _evenly(schedule.num_timesteps - 1, num_steps)[::-1])
    return _by_sigma(schedule, _spaced(schedule.num_timesteps, num_steps, spacing, offset))


def dpmpp_trajectory(schedule: NoiseSchedule, num_steps: int, spacing: Spacing, offset: int) -> Trajectory:
    """As DDPM's, but `linspace` and `leading` are cut into one part more and the last is left out.

    Arguments and errors as in `ddpm_trajectory`; with those two spacings at most T − 1 steps fit.
    """
    count = schedule.num_timesteps
    if spacing == "trailing":
        return _by_sigma(schedule, _spaced(count, num_steps, spacing, offset))
    return _by_sigma(schedule, _spaced(count, num_steps + 1, spacing, offset, leave_out_last=True))


def _spaced(num_levels: int, num_steps: int, spacing: Spacing, offset: int, leave_out_last: bool = False) -> list[int]:
    """`num_steps` levels in [0, num_levels), falling."""
    if not 1 <= num_steps <= num_levels:
        raise ValueError(f"num_steps={num_steps - leave_out_last} with {num_levels} levels and {spacing} spacing")
    if spacing == "linspace":
        timesteps = [round(t) for t in _evenly(num_levels - 1, num_steps)[::-1]]
    elif spacing == "trailing":
        # The stride as floating point leaves it at T: ties of `round` then fall as they do in numpy's arange.
        stride = num_levels - (num_levels - num_levels / num_steps)
        timesteps = [round(num_levels - i * stride) - 1 for i in range(num_steps)]
    else:
        stride = num_levels // num_steps
        timesteps = [i * stride for i in reversed(range(num_steps))]
    if leave_out_last:
        timesteps.pop()
    if spacing == "leading":
        # With almost as many steps as levels the offset would lead past the last level.
        offset = min(offset, num_levels - 1 - timesteps[0])
        timesteps = [t + offset for t in timesteps]
    return timesteps


def _evenly(stop: int, count: int) -> list[float]:
    """`count` numbers from 0 to `stop`, both included; only 0 when `count` is 1."""
    return [0.0] if count == 1 else [i * (stop / (count - 1)) for i in range(count - 1)] + [float(stop)]


def _by_sigma(schedule: NoiseSchedule, timesteps: Sequence[float]) -> Trajectory:
    """Levels where σ = √(1/ᾱ − 1) is that of the schedule, linear in between; ends as in DDPM."""
    sigmas = [math.sqrt(1.0 / max(a, _LEAST_ALPHA_BAR) - 1.0) for a in schedule.alphas_cumprod.tolist()]

    def alpha_bar(t: float) -> float:
        low = min(bisect_right(range(len(sigmas)), t) - 1, len(sigmas) - 2)
        sigma = sigmas[low] + (t - low) * (sigmas[low + 1] - sigmas[low])
        return 1.0 / (1.0 + sigma**2)

    alphas = [alpha_bar(t) for t in timesteps]
    return Trajectory(tuple(map(float, timesteps)), tuple(alphas), (*alphas[1:], 1.0))
