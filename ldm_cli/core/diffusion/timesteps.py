"""Which noise levels a sampler visits: the time spacings in use, and what each family of samplers makes of them.

`leading`, `linspace` and `trailing` are those of Lin et al. 2023, table 2, arXiv:2305.08891, `karras` is eq. 5 of
Karras et al. 2022, arXiv:2206.00364. The numbers equal those of the diffusers scheduler of the same sampler,
also where two of them differ for no good reason: pictures can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self, TypeGuard

import torch

from ldm_cli.core.diffusion.level import LEAST_ALPHA_BAR, Level, Levels
from ldm_cli.core.diffusion.schedule import NoiseSchedule, shifted

Spacing = Literal["leading", "linspace", "trailing", "karras", "exponential"]

_KARRAS_RHO = 7.0


@dataclass(frozen=True)
class Trajectory:
    """The levels of one sampling run, from noise to image.

    Attributes:
        steps: level at the start and at the end of each step.
        levels: the levels in between, for samplers that look there.
        start_scale: what standard normal noise is multiplied with to begin.
        straight: whether Heun's, DPM2's and LMS's variable is s = b / (a + b) of x / (a + b), in which flow matching's
            paths are straight, or σ = b / a of x / a. In both, the probability-flow ODE of z is dz/ds = (z − x_0) / s.
    """

    steps: tuple[tuple[Level, Level], ...]
    levels: Levels
    start_scale: float = 1.0
    straight: bool = False

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.steps)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """t at the start of each step, falling."""
        return tuple(start.t for start, _ in self.steps)

    def last(self, count: int) -> Self:
        """The last `count` steps, 0 … len."""
        return replace(self, steps=self.steps[len(self) - count :])

    def finite(self) -> Self:
        """The same for samplers that cannot start without any signal: it is at least √LEAST_ALPHA_BAR."""
        least = math.sqrt(LEAST_ALPHA_BAR)

        def lifted(level: Level) -> Level:
            return replace(level, signal=max(level.signal, least))

        return replace(self, steps=tuple((lifted(start), lifted(end)) for start, end in self.steps))

    def coordinates(self, level: Level) -> tuple[float, float]:
        """(s, c) such that z = x / c moves along dz/ds = (z − x_0) / s."""
        scale = level.signal + level.noise if self.straight else level.signal
        return level.noise / scale, scale

    def between(self, start: Level, end: Level) -> Level:
        """The level halfway in log s; `end` must hold noise."""
        s = math.sqrt(self.coordinates(start)[0] * self.coordinates(end)[0])
        return self.levels.at(s / (1.0 - s) if self.straight else s)


def ddpm_trajectory(
    schedule: NoiseSchedule, num_steps: int, spacing: Spacing | Sequence[float], offset: int
) -> Trajectory:
    """Each step ends where the next begins, the last at x_0.

    Args:
        schedule: the training levels.
        num_steps: 1 … T.
        spacing: which levels are visited; or a falling table of t, resampled to `num_steps`.
        offset: added to every level when spacing is `leading`.

    Raises:
        ValueError: more steps than levels.
    """
    levels = Levels(schedule)
    if schedule.flow_shift is not None or not _is_linear(spacing):
        return _chain(levels, _visited(levels, num_steps, spacing, offset))
    return _chain(levels, [_trained(schedule, t) for t in _spaced(schedule.num_timesteps, num_steps, spacing, offset)])


def ddim_trajectory(
    schedule: NoiseSchedule, num_steps: int, spacing: Spacing | Sequence[float], offset: int, set_alpha_to_one: bool
) -> Trajectory:
    """Each step ends T // num_steps levels below its start, or below level 0: at x_0 or level 0.

    With `linspace` and `trailing` that end is not quite where the next step begins: so it is in diffusers. Other
    spacings, and flow matching, are as in `ddpm_trajectory`, whose arguments and errors these are.

    Args:
        set_alpha_to_one: whether the last step ends at x_0 or at level 0.
    """
    if schedule.flow_shift is not None or not _is_linear(spacing):
        return ddpm_trajectory(schedule, num_steps, spacing, offset)
    last = _CLEAN if set_alpha_to_one else _trained(schedule, 0)
    stride = schedule.num_timesteps // num_steps
    timesteps = _spaced(schedule.num_timesteps, num_steps, spacing, offset)
    steps = [(_trained(schedule, t), _trained(schedule, t - stride) if t >= stride else last) for t in timesteps]
    return Trajectory(tuple(steps), Levels(schedule))


def euler_trajectory(
    schedule: NoiseSchedule, num_steps: int, spacing: Spacing | Sequence[float], offset: int
) -> Trajectory:
    """As DDPM's, but `linspace` falls on fractions of levels, with σ interpolated.

    It begins at σ · noise of x / a, with `leading` at √(σ² + 1) · noise: so it is in diffusers. Arguments and errors as
    in `ddpm_trajectory`.
    """
    path = _chain(Levels(schedule), _visited(Levels(schedule), num_steps, spacing, offset))
    return path if spacing == "leading" else replace(path, start_scale=path.steps[0][0].noise)


def dpmpp_trajectory(
    schedule: NoiseSchedule, num_steps: int, spacing: Spacing | Sequence[float], offset: int
) -> Trajectory:
    """As DDPM's, but `linspace` and `leading` are cut into one part more and the last is left out.

    `karras` and `exponential` tell the network whole numbers, as in diffusers. Arguments and
    errors as in `ddpm_trajectory`; with the first two at most T − 1 steps fit.
    """
    levels = Levels(schedule)
    if schedule.flow_shift is None and spacing in ("linspace", "leading"):
        timesteps = _spaced(schedule.num_timesteps, num_steps + 1, spacing, offset, leave_out_last=True)
        return _chain(levels, [levels.at_time(t) for t in timesteps])
    visited = _visited(levels, num_steps, spacing, offset)
    if schedule.flow_shift is None and spacing in ("karras", "exponential"):
        visited = [replace(level, t=float(round(level.t))) for level in visited]
    return _chain(levels, visited).finite()


def lcm_trajectory(schedule: NoiseSchedule, num_steps: int, num_distilled: int = 50) -> Trajectory:
    """Levels that a latent consistency model was distilled at (Luo et al. 2023, section 4.3, arXiv:2310.04378).

    Args:
        schedule: the training levels.
        num_steps: 1 … `num_distilled`.
        num_distilled: number of levels, with equal strides, of the distillation.

    Raises:
        ValueError: more steps than that.
    """
    num_distilled = min(num_distilled, schedule.num_timesteps)
    if not 1 <= num_steps <= num_distilled:
        raise ValueError(f"num_steps={num_steps} with {num_distilled} distilled levels")
    stride = schedule.num_timesteps // num_distilled
    distilled = [i * stride - 1 for i in range(num_distilled, 0, -1)]
    chosen = [distilled[i * num_distilled // num_steps] for i in range(num_steps)]
    return _chain(Levels(schedule), [_trained(schedule, t) for t in chosen])


_CLEAN = Level(0.0, 1.0, 0.0)


def _is_linear(spacing: Spacing | Sequence[float]) -> TypeGuard[Spacing]:
    return spacing in ("leading", "linspace", "trailing")


def _trained(schedule: NoiseSchedule, t: int) -> Level:
    """Training level number t."""
    return Level(float(schedule.times[t]), float(schedule.signals[t]), float(schedule.noises[t]))


def _chain(levels: Levels, visited: Sequence[Level]) -> Trajectory:
    """From each level to the next, from the last to x_0."""
    return Trajectory(tuple(zip(visited, [*visited[1:], _CLEAN], strict=True)), levels)


def _visited(levels: Levels, num_steps: int, spacing: Spacing | Sequence[float], offset: int) -> list[Level]:
    """`num_steps` levels, falling, between those of training."""
    schedule, sigmas = levels.schedule, levels.sigmas
    if not isinstance(spacing, str):
        highest = schedule.num_timesteps - (schedule.flow_shift is None)
        if max(spacing) > highest:
            raise ValueError(f"timestep {max(spacing)} is above the highest, {highest}")
        table = [levels.at_time(t) for t in spacing]
        return table if len(table) == num_steps else [levels.at(s) for s in _resampled(table, num_steps)]
    if spacing == "karras":
        high, low = sigmas[-1] ** (1.0 / _KARRAS_RHO), sigmas[0] ** (1.0 / _KARRAS_RHO)
        return [levels.at(root**_KARRAS_RHO) for root in _from_to(high, low, num_steps)]
    if spacing == "exponential":
        return [levels.at(math.exp(log)) for log in _from_to(math.log(sigmas[-1]), math.log(sigmas[0]), num_steps)]
    if schedule.flow_shift is not None:
        # From the first to the last training level, both shifted already, and shifted again: so it is in diffusers.
        noises = _from_to(float(schedule.noises[-1]), float(schedule.noises[0]), num_steps)
        moved = shifted(torch.tensor(noises, dtype=torch.float64), schedule.flow_shift).tolist()
        return [Level(schedule.num_timesteps * b, 1.0 - b, b) for b in moved]
    if spacing == "linspace":
        return [levels.at_time(t) for t in _evenly(schedule.num_timesteps - 1, num_steps)[::-1]]
    return [levels.at_time(t) for t in _spaced(schedule.num_timesteps, num_steps, spacing, offset)]


def _resampled(table: Sequence[Level], count: int) -> list[float]:
    """σ of `count` levels, as many apart in the table as each other, linear in log σ between its entries."""
    logs = [-level.log_snr for level in table]
    positions = _from_to(0.0, len(logs) - 1.0, count)
    lows = [min(int(p), max(len(logs) - 2, 0)) for p in positions]
    ends = [(logs[low], logs[min(low + 1, len(logs) - 1)]) for low in lows]
    return [math.exp(a + (p - low) * (b - a)) for p, low, (a, b) in zip(positions, lows, ends, strict=True)]


def _from_to(first: float, last: float, count: int) -> list[float]:
    """`count` numbers with equal differences; only `first` when `count` is 1."""
    if count == 1:
        return [first]
    return [first + (last - first) * (i / (count - 1)) for i in range(count - 1)] + [last]


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
