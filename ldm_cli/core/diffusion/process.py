"""The forward process x_t = a x_0 + b ε: its noise levels (a, b), and the time that the network is given at each.

Variance preserving: a = √ᾱ_t, b = √(1 − ᾱ_t), ᾱ_t = Π_{s ≤ t} (1 − β_s)  (Ho et al. 2020, eq. 4, arXiv:2006.11239)
Flow matching:       a = 1 − s, b = s, the straight line from data to noise (Lipman et al. 2023, arXiv:2210.02747),
                     where s = k u / (1 + (k − 1) u) is shifted towards noise (Esser et al. 2024, eq. 23,
                     arXiv:2403.03206)
SNR = a² / b²                                                      (Kingma et al. 2021, arXiv:2107.00630)

Training draws u in [0, 1) and asks for its level. Samplers ask for the level of a σ = b / a or a time, or for spacings.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from ldm_cli.core.diffusion.betas import alphas_cumprod
from ldm_cli.core.diffusion.config import DiffusionConfig
from ldm_cli.core.diffusion.prediction import PREDICTIONS, Prediction
from ldm_cli.core.diffusion.spacing import LinearSpacing, fractional_timesteps, from_to, whole_timesteps

# Samplers in σ-space cannot start at infinite σ: zero signal counts as this ᾱ, the least positive float16.
LEAST_ALPHA_BAR = 2.0**-24
MAX_SIGMA = math.sqrt(1.0 / LEAST_ALPHA_BAR - 1.0)

Number = TypeVar("Number", float, Tensor)
Cut = Literal["whole", "fractional", "open"]
"""How a variance-preserving process cuts a spacing: into whole timesteps; `linspace` into fractions; or so that the
end stays open, which drops the last timestep of `linspace` and `leading`."""


@dataclass(frozen=True)
class Level:
    """One noise level: x = signal · x_0 + noise · ε.

    Attributes:
        t: the time that the network is given; fractions lie between two training levels.
        signal: a in [0, 1].
        noise: b in [0, 1].
    """

    t: float
    signal: float
    noise: float

    @property
    def sigma(self) -> float:
        """σ = b / a in [0, ∞], the noise level of Karras et al. 2022."""
        return self.noise / self.signal if self.signal > 0.0 else math.inf

    @property
    def log_snr(self) -> float:
        """λ = log(a / b) in [−∞, ∞], half the log of the signal-to-noise ratio, in which DPM-Solvers step."""
        if self.signal == 0.0 or self.noise == 0.0:
            return math.inf if self.noise == 0.0 else -math.inf
        return math.log(self.signal) - math.log(self.noise)


CLEAN = Level(0.0, 1.0, 0.0)
"""Where sampling ends: x_0 itself."""


class Process(Protocol):
    """The noise levels that a network is trained at, and those in between."""

    @property
    def num_timesteps(self) -> int:
        """T: times lie in [0, T]."""

    @property
    def prediction(self) -> Prediction:
        """What the network predicts."""

    @property
    def is_straight(self) -> bool:
        """Whether x_t moves from data to noise on a straight line. Heun's method, DPM2 and LMS then take steps in
        b / (a + b), else in σ."""

    def at(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The training levels at u, which is the share of levels with less noise.

        Args:
            u: float, any shape, in [0, 1).

        Returns:
            a and b, float64, and the time, float32, each of u's shape and on its device.
        """

    def training_level(self, index: int) -> Level:
        """Training level 0 (almost clean) … T − 1 (almost, or exactly, pure noise)."""

    def at_sigma(self, sigma: float) -> Level:
        """The level of noise-to-signal ratio σ ≥ 0."""

    def at_time(self, time: float) -> Level:
        """The level of a time in [0, T]; its σ is finite: MAX_SIGMA at zero signal where variance is preserved."""

    def in_training(self, level: Level) -> Level:
        """The same level with the nearest time that training visits."""

    def levels(self, num_steps: int, spacing: LinearSpacing, offset: int, cut: Cut) -> list[Level]:
        """`num_steps` levels, noise falling. Flow matching ignores spacing, offset and cut.

        Raises:
            ValueError: more steps than levels.
        """

    def ddim_ends(self, starts: Sequence[Level], last: Level) -> list[Level]:
        """The levels where DDIM's steps from `starts` end; `last` where there is no level so low."""


def process_of(config: DiffusionConfig) -> Process:
    """The process that a recipe, or a diffusers scheduler_config.json, describes."""
    prediction = PREDICTIONS[config.prediction_type]
    if config.prediction_type == "flow_prediction":
        return Flow(config.num_train_timesteps, config.flow_shift, prediction)
    return VariancePreserving(alphas_cumprod(config), prediction)


@dataclass(frozen=True, eq=False)
class VariancePreserving:
    """T discrete levels, a² + b² = 1; methods as in `Process`.

    Attributes:
        alphas_cumprod: ᾱ_t, the signal's share of the variance, float64 [T], falling, in [0, 1).
    """

    alphas_cumprod: Tensor
    prediction: Prediction
    _tables: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.alphas_cumprod)

    @property
    def is_straight(self) -> bool:
        """No."""
        return False

    def at(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Level ⌊u T⌋; the time is the level."""
        t = (u.double() * self.num_timesteps).long().clamp(max=self.num_timesteps - 1)
        a, b = self._table(u.device)[:, t]
        return a, b, t.float()

    def training_level(self, index: int) -> Level:
        """Level t = index."""
        signal, noise = self._table(torch.device("cpu"))[:, index].tolist()
        return Level(float(index), signal, noise)

    def at_sigma(self, sigma: float) -> Level:
        """The time is interpolated in log σ, within [0, T − 1]."""
        signal = 1.0 / math.sqrt(1.0 + sigma**2)
        return Level(self._time(sigma), signal, sigma * signal)

    def at_time(self, time: float) -> Level:
        """σ is interpolated linearly."""
        low = min(int(time), self.num_timesteps - 2)
        sigma = self._sigmas[low] + (time - low) * (self._sigmas[low + 1] - self._sigmas[low])
        return replace(self.at_sigma(sigma), t=float(time))

    def in_training(self, level: Level) -> Level:
        """Times of training are whole."""
        return replace(level, t=float(round(level.t)))

    def levels(self, num_steps: int, spacing: LinearSpacing, offset: int, cut: Cut) -> list[Level]:
        """Only `whole` cuts reach zero signal."""
        if cut == "fractional" and spacing == "linspace":
            return [self.at_time(t) for t in fractional_timesteps(self.num_timesteps, num_steps)]
        level_at = self.training_level if cut == "whole" else self.at_time
        timesteps = whole_timesteps(self.num_timesteps, num_steps, spacing, offset, drop_last=cut == "open")
        return [level_at(t) for t in timesteps]

    def ddim_ends(self, starts: Sequence[Level], last: Level) -> list[Level]:
        """T // steps levels below.

        With `linspace` and `trailing` that is not quite where the next step begins: so it is in diffusers.
        """
        stride = self.num_timesteps // len(starts)
        ends = [int(start.t) - stride for start in starts]
        return [self.training_level(t) if t >= 0 else last for t in ends]

    def _table(self, device: torch.device) -> Tensor:
        """a and b, float64 [2, T]; copied to each device once."""
        if device not in self._tables:
            self._tables[device] = torch.stack([self.alphas_cumprod, 1.0 - self.alphas_cumprod]).sqrt().to(device)
        return self._tables[device]

    @cached_property
    def _sigmas(self) -> list[float]:
        """σ of the training levels, rising; the last is finite."""
        return [math.sqrt(1.0 / (share or LEAST_ALPHA_BAR) - 1.0) for share in self.alphas_cumprod.tolist()]

    @cached_property
    def _logs(self) -> list[float]:
        return [math.log(sigma) for sigma in self._sigmas]

    def _time(self, sigma: float) -> float:
        logs = self._logs
        if sigma <= self._sigmas[0]:
            return 0.0
        low = min(bisect_right(self._sigmas, sigma) - 1, len(logs) - 2)
        return min(low + (math.log(sigma) - logs[low]) / (logs[low + 1] - logs[low]), len(logs) - 1.0)


@dataclass(frozen=True)
class Flow:
    """Continuous levels on a straight line, a + b = 1, time T b; methods as in `Process`.

    Attributes:
        num_timesteps: T, the time of pure noise.
        shift: k > 0; above 1 moves the levels towards noise.
        is_shifted_once: whether `levels` shifts evenly spaced levels once, as diffusers does with a dynamic shift; else
            it spaces them between the shifted ends and shifts them again, as diffusers does with a fixed one.
    """

    num_timesteps: int
    shift: float
    prediction: Prediction
    is_shifted_once: bool = False

    @property
    def is_straight(self) -> bool:
        """Yes."""
        return True

    def at(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """s = shifted u."""
        s = self._shifted(u.double())
        return 1.0 - s, s, (self.num_timesteps * s).float()

    def training_level(self, index: int) -> Level:
        """The level of u = (index + 1) / T: the last one is pure noise."""
        return self._level(self._shifted((index + 1) / self.num_timesteps))

    def at_sigma(self, sigma: float) -> Level:
        """b = σ / (1 + σ)."""
        return self._level(sigma / (1.0 + sigma))

    def at_time(self, time: float) -> Level:
        """b = t / T."""
        return self._level(time / self.num_timesteps)

    def in_training(self, level: Level) -> Level:
        """Every time is one of training."""
        return level

    def levels(self, num_steps: int, spacing: LinearSpacing, offset: int, cut: Cut) -> list[Level]:
        """From the last to the first training level; see `is_shifted_once`.

        An `open` cut is that of diffusers' DPMSolverMultistepScheduler with `use_flow_sigmas`: from the last level
        but one in equal parts towards zero, which is not among them.
        """
        if cut == "open":
            highest = 1.0 - 1.0 / self.num_timesteps
            return [self._level(self._shifted(highest * (1.0 - i / num_steps))) for i in range(num_steps)]
        last, first = (self.training_level(i).noise for i in (self.num_timesteps - 1, 0))
        if self.is_shifted_once:
            last, first = 1.0, 1.0 / self.num_timesteps
        return [self._level(self._shifted(b)) for b in from_to(last, first, num_steps)]

    def ddim_ends(self, starts: Sequence[Level], last: Level) -> list[Level]:
        """Each step ends where the next one begins, the last at x_0."""
        return [*starts[1:], CLEAN]

    def _shifted(self, u: Number) -> Number:
        return self.shift * u / (1.0 + (self.shift - 1.0) * u)

    def _level(self, noise: float) -> Level:
        return Level(self.num_timesteps * noise, 1.0 - noise, noise)
