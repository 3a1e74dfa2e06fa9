"""Which noise levels a sampler visits: the time spacings in use, and how each kind of sampler uses them.

`leading`, `linspace` and `trailing` are those of Lin et al. 2023, table 2, arXiv:2305.08891, `karras` is eq. 5 of
Karras et al. 2022, arXiv:2206.00364. The numbers equal those of the diffusers scheduler of the same sampler,
also where two of them differ for no good reason: pictures can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self, TypeGuard

from ldm_cli.core.diffusion.process import CLEAN, LEAST_ALPHA_BAR, MAX_SIGMA, Cut, Level, Process
from ldm_cli.core.diffusion.spacing import LinearSpacing, SigmaSpacing, Spacing, from_to

_KARRAS_RHO = 7.0


@dataclass(frozen=True)
class Timesteps:
    """The levels of one sampling run, from noise to image.

    Attributes:
        steps: level at the start and at the end of each step.
        process: gives levels in between, to samplers that look there.
        straight: whether Heun's, DPM2's and LMS's variable is s = b / (a + b) of x / (a + b), in which flow matching's
            paths are straight, or σ = b / a of x / a. In both, the probability-flow ODE of z is dz/ds = (z − x_0) / s.
        start_scale: what standard normal noise is multiplied with to begin.
    """

    steps: tuple[tuple[Level, Level], ...]
    process: Process
    straight: bool
    start_scale: float = 1.0

    @classmethod
    def through(cls, visited: Sequence[Level], process: Process) -> Self:
        """From each level to the next, from the last to x_0."""
        return cls(tuple(zip(visited, [*visited[1:], CLEAN], strict=True)), process, process.is_straight)

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.steps)

    @property
    def times(self) -> tuple[float, ...]:
        """t at the start of each step, falling."""
        return tuple(start.t for start, _ in self.steps)

    def last(self, count: int) -> Self:
        """The last `count` steps, 0 … len."""
        return replace(self, steps=self.steps[len(self) - count :])

    def finite(self) -> Self:
        """The same for samplers that cannot start without any signal: √LEAST_ALPHA_BAR takes the place of 0."""
        least = math.sqrt(LEAST_ALPHA_BAR)

        def lifted(level: Level) -> Level:
            return level if level.signal > 0.0 else replace(level, signal=least)

        return replace(self, steps=tuple((lifted(start), lifted(end)) for start, end in self.steps))

    def coordinates(self, level: Level) -> tuple[float, float]:
        """(s, c) such that z = x / c moves along dz/ds = (z − x_0) / s."""
        scale = level.signal + level.noise if self.straight else level.signal
        return level.noise / scale, scale

    def between(self, start: Level, end: Level) -> Level:
        """The level halfway in log s; `end` must hold noise."""
        s = math.sqrt(self.coordinates(start)[0] * self.coordinates(end)[0])
        return self.process.at_sigma(s / (1.0 - s) if self.straight else s)


def ddpm_timesteps(process: Process, num_steps: int, spacing: Spacing | Sequence[float], offset: int) -> Timesteps:
    """Each step ends where the next begins, the last at x_0.

    Args:
        num_steps: 1 … T.
        spacing: which levels are visited; or a falling table of t, resampled to `num_steps`.
        offset: added to every level when spacing is `leading`.

    Raises:
        ValueError: more steps than levels.
    """
    return Timesteps.through(_visited(process, num_steps, spacing, offset, "whole"), process)


def ddim_timesteps(
    process: Process, num_steps: int, spacing: Spacing | Sequence[float], offset: int, set_alpha_to_one: bool
) -> Timesteps:
    """Each step ends T // num_steps levels below its start, or below level 0: at x_0 or level 0.

    Other spacings than `leading`, `linspace` and `trailing`, and flow matching, are as in `ddpm_timesteps`, whose
    arguments and errors these are.

    Args:
        set_alpha_to_one: whether the last step ends at x_0 or at level 0.
    """
    timesteps = ddpm_timesteps(process, num_steps, spacing, offset)
    if not _is_linear(spacing):
        return timesteps
    starts = [start for start, _ in timesteps.steps]
    ends = process.ddim_ends(starts, CLEAN if set_alpha_to_one else process.training_level(0))
    return replace(timesteps, steps=tuple(zip(starts, ends, strict=True)))


def euler_timesteps(process: Process, num_steps: int, spacing: Spacing | Sequence[float], offset: int) -> Timesteps:
    """As DDPM's, but `linspace` falls on fractions of levels, with σ interpolated.

    It begins at σ · noise of x / a, with `leading` at √(σ² + 1) · noise: so it is in diffusers. Arguments and errors as
    in `ddpm_timesteps`.
    """
    timesteps = Timesteps.through(_visited(process, num_steps, spacing, offset, "fractional"), process)
    linear = spacing.between if isinstance(spacing, SigmaSpacing) else spacing
    return timesteps if linear == "leading" else replace(timesteps, start_scale=timesteps.steps[0][0].noise)


def dpmpp_timesteps(process: Process, num_steps: int, spacing: Spacing | Sequence[float], offset: int) -> Timesteps:
    """As DDPM's, but `linspace` and `leading` are cut into one part more and the last is dropped.

    With a `SigmaSpacing` the network is given times of training, and the ends are those of training, as in diffusers.
    Arguments and errors as in `ddpm_timesteps`; with `linspace` and `leading` at most T − 1 steps fit.
    """
    if isinstance(spacing, SigmaSpacing):
        spacing = replace(spacing, between=None)
    visited = _visited(process, num_steps, spacing, offset, "open")
    if isinstance(spacing, SigmaSpacing):
        visited = [process.in_training(level) for level in visited]
    return Timesteps.through(visited, process).finite()


def lcm_timesteps(process: Process, num_steps: int, num_distilled: int) -> Timesteps:
    """Levels that a latent consistency model was distilled at (Luo et al. 2023, section 4.3, arXiv:2310.04378).

    Args:
        num_steps: 1 … `num_distilled`.
        num_distilled: number of levels, with equal strides, of the distillation.

    Raises:
        ValueError: more steps than that.
    """
    num_distilled = min(num_distilled, process.num_timesteps)
    if not 1 <= num_steps <= num_distilled:
        raise ValueError(f"num_steps={num_steps} with {num_distilled} distilled levels")
    stride = process.num_timesteps // num_distilled
    distilled = [i * stride - 1 for i in range(num_distilled, 0, -1)]
    chosen = [distilled[i * num_distilled // num_steps] for i in range(num_steps)]
    return Timesteps.through([process.training_level(t) for t in chosen], process)


def _is_linear(spacing: Spacing | Sequence[float]) -> TypeGuard[LinearSpacing]:
    return spacing in ("leading", "linspace", "trailing")


def _visited(
    process: Process, num_steps: int, spacing: Spacing | Sequence[float], offset: int, cut: Cut
) -> list[Level]:
    """`num_steps` levels, falling, between those of training; `cut` matters to the linear spacings."""
    if _is_linear(spacing):
        return process.levels(num_steps, spacing, offset, cut)
    last = process.training_level(process.num_timesteps - 1)
    if isinstance(spacing, SigmaSpacing):
        ends = [last, process.training_level(0)]
        if spacing.between is not None:
            ends = process.levels(num_steps, spacing.between, offset, cut)
        high = spacing.sigma_max or (ends[0].sigma if ends[0].signal > 0.0 else MAX_SIGMA)
        low = spacing.sigma_min or ends[-1].sigma
        if spacing.kind == "exponential":
            return [process.at_sigma(math.exp(log)) for log in from_to(math.log(high), math.log(low), num_steps)]
        roots = from_to(high ** (1.0 / _KARRAS_RHO), low ** (1.0 / _KARRAS_RHO), num_steps)
        return [process.at_sigma(root**_KARRAS_RHO) for root in roots]
    times = [float(time) for time in spacing]
    if max(times) > last.t:
        raise ValueError(f"timestep {max(times)} is above the highest, {last.t:g}")
    table = [process.at_time(time) for time in times]
    return table if len(table) == num_steps else [process.at_sigma(sigma) for sigma in _resampled(table, num_steps)]


def _resampled(table: Sequence[Level], count: int) -> list[float]:
    """σ of `count` levels, as many apart in the table as each other, linear in log σ between its entries."""
    logs = [-level.log_snr for level in table]
    positions = from_to(0.0, len(logs) - 1.0, count)
    lows = [min(int(p), max(len(logs) - 2, 0)) for p in positions]
    ends = [(logs[low], logs[min(low + 1, len(logs) - 1)]) for low in lows]
    return [math.exp(a + (p - low) * (b - a)) for p, low, (a, b) in zip(positions, lows, ends, strict=True)]
