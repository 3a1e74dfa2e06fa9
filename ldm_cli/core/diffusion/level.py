"""Noise levels, those that a network was trained at and those in between."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cached_property

from ldm_cli.core.diffusion.schedule import NoiseSchedule

# Samplers in σ-space cannot start at infinite σ: zero signal counts as this ᾱ, the least positive float16.
LEAST_ALPHA_BAR = 2.0**-24


@dataclass(frozen=True)
class Level:
    """One noise level: x = signal · x_0 + noise · ε.

    Attributes:
        t: what the network is told; fractions lie between two training levels.
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


@dataclass(frozen=True)
class Levels:
    """The noise level at any σ, between those that the network was trained at.

    Attributes:
        schedule: the training levels.
    """

    schedule: NoiseSchedule

    @cached_property
    def sigmas(self) -> list[float]:
        """σ of the training levels, rising; the last is finite."""
        return [math.sqrt(1.0 / max(a, LEAST_ALPHA_BAR) - 1.0) for a in self.schedule.alphas_cumprod.tolist()]

    @cached_property
    def _logs(self) -> list[float]:
        return [math.log(sigma) for sigma in self.sigmas]

    def at(self, sigma: float) -> Level:
        """The level of noise-to-signal ratio σ ≥ 0; its t is interpolated in log σ, within those of training."""
        if self.schedule.flow_shift is not None:
            noise = sigma / (1.0 + sigma)
            return Level(self.schedule.num_timesteps * noise, 1.0 / (1.0 + sigma), noise)
        signal = 1.0 / math.sqrt(1.0 + sigma**2)
        return Level(self._t(sigma), signal, sigma * signal)

    def at_time(self, t: float) -> Level:
        """The level of a t in [0, T − 1], its σ interpolated linearly (`t` of flow matching: T · noise)."""
        if self.schedule.flow_shift is not None:
            noise = t / self.schedule.num_timesteps
            return Level(t, 1.0 - noise, noise)
        low = min(bisect_right(range(len(self.sigmas)), t) - 1, len(self.sigmas) - 2)
        sigma = self.sigmas[low] + (t - low) * (self.sigmas[low + 1] - self.sigmas[low])
        return replace(self.at(sigma), t=float(t))

    def _t(self, sigma: float) -> float:
        logs = self._logs
        if sigma <= self.sigmas[0]:
            return 0.0
        low = min(bisect_right(self.sigmas, sigma) - 1, len(logs) - 2)
        return min(low + (math.log(sigma) - logs[low]) / (logs[low + 1] - logs[low]), len(logs) - 1.0)
