"""The forward process: how much signal and how much noise each discrete level holds, x_t = a_t x_0 + b_t ε.

Variance preserving: a_t = √ᾱ_t, b_t = √(1 − ᾱ_t), ᾱ_t = Π_{s ≤ t} (1 − β_s)  (Ho et al. 2020, eq. 4, arXiv:2006.11239)
Flow matching:       a_t = 1 − s, b_t = s, the straight line from data to noise (Lipman et al. 2023, arXiv:2210.02747),
                     where s is t/T, shifted towards noise: s ← k s / (1 + (k − 1) s)
                     (Esser et al. 2024, eq. 23, arXiv:2403.03206)
SNR(t) = a_t² / b_t²                                               (Kingma et al. 2021, arXiv:2107.00630)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_cli.core.diffusion.config import DiffusionConfig

_MAX_BETA = 0.999


@dataclass(frozen=True)
class NoiseSchedule:
    """T noise levels, t = 0 (almost clean) … T − 1 (almost, or with zero SNR or flow exactly, pure noise).

    Attributes:
        signals: a_t, float64 [T], falling, in [0, 1).
        noises: b_t, float64 [T], rising, in (0, 1].
        times: what the network is told of a level, float64 [T]: t, or with flow T · b_t.
        prediction_type: what the network predicts: `epsilon`, `v_prediction`, `sample` or `flow_prediction`.
        flow_shift: k of flow matching; None if the process preserves variance.
    """

    signals: Tensor
    noises: Tensor
    times: Tensor
    prediction_type: str
    flow_shift: float | None = None

    @classmethod
    def from_config(cls, config: DiffusionConfig) -> NoiseSchedule:
        """The schedule that a recipe, or a diffusers scheduler_config.json, describes."""
        count, kind = config.num_train_timesteps, config.prediction_type
        if kind == "flow_prediction":
            s = shifted(torch.arange(1, count + 1, dtype=torch.float64) / count, config.flow_shift)
            return cls(1.0 - s, s, count * s, kind, config.flow_shift)
        betas = _betas(config)
        if config.rescale_betas_zero_snr:
            betas = _with_zero_terminal_snr(betas)
        # In float32, one product after the other: these rounded numbers, not the ideal ones, are what
        # published models were trained with, and near t = 0 rounding moves 1 − ᾱ by 1e-4 of itself. Then
        # float64, so that the coefficients made of them lose nothing more.
        alpha_bar = torch.cumprod(1.0 - betas, dim=0).double()
        return cls(alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt(), torch.arange(count, dtype=torch.float64), kind)

    @property
    def num_timesteps(self) -> int:
        """The number of levels T."""
        return len(self.signals)

    @property
    def alphas_cumprod(self) -> Tensor:
        """ᾱ_t, the share of the signal's variance in that of x_t for data of variance 1, float64 [T]."""
        return self.signals**2 / (self.signals**2 + self.noises**2)

    def signal_and_noise(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """a_t and b_t as [B, 1, …], shaped and typed to be multiplied with `like` [B, …].

        Args:
            t: int64 [B], levels in [0, T).
            like: any tensor [B, …]; gives device, type and number of dimensions.
        """
        if t.shape != like.shape[:1]:
            raise ValueError(f"timesteps of shape {tuple(t.shape)} for a batch of shape {tuple(like.shape)}")
        shape = (-1, *[1] * (like.ndim - 1))
        signal, noise = (
            table.to(like.device)[t].reshape(shape).to(like.dtype) for table in (self.signals, self.noises)
        )
        return signal, noise

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = a_t x_0 + b_t ε, of x0's shape and type.

        Args:
            x0, noise: [B, …].
            t: int64 [B].
        """
        signal, sigma = self.signal_and_noise(t, x0)
        return signal * x0 + sigma * noise

    def velocity(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """v_t = a_t ε − b_t x_0, of x0's shape and type (Salimans & Ho 2022, arXiv:2202.00512)."""
        signal, sigma = self.signal_and_noise(t, x0)
        return signal * noise - sigma * x0

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should output for x_t: ε, v, x_0 or u = ε − x_0, [B, …]."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "v_prediction":
            return self.velocity(x0, noise, t)
        return noise - x0 if self.prediction_type == "flow_prediction" else x0

    def told(self, t: Tensor) -> Tensor:
        """What the network is told of levels t, float32 of t's shape: t itself, or with flow T · b_t."""
        return self.times.to(t.device)[t].float()

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio a_t² / b_t², float64 of t's shape; 0 at the last zero-SNR level."""
        return (self.signals.to(t.device)[t] / self.noises.to(t.device)[t]) ** 2


def shifted(s: Tensor, shift: float) -> Tensor:
    """k s / (1 + (k − 1) s), of the shape of `s` in [0, 1]; 1 is the identity."""
    return shift * s / (1.0 + (shift - 1.0) * s)


def _betas(config: DiffusionConfig) -> Tensor:
    """β_t as float32 [T], before any rescaling."""
    count, first, last = config.num_train_timesteps, config.beta_start, config.beta_end
    if config.beta_schedule == "linear":
        return torch.linspace(first, last, count, dtype=torch.float32)
    if config.beta_schedule == "scaled_linear":
        return torch.linspace(math.sqrt(first), math.sqrt(last), count, dtype=torch.float32) ** 2
    # Nichol & Dhariwal 2021, eq. 17, arXiv:2102.09672; the offset 0.008 keeps the first β from vanishing.
    time = torch.arange(count + 1, dtype=torch.float64) / count
    alpha_bar = torch.cos((time + 0.008) / 1.008 * (math.pi / 2)) ** 2
    return (1.0 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=_MAX_BETA).float()


def _with_zero_terminal_snr(betas: Tensor) -> Tensor:
    """β after √ᾱ is shifted and scaled: its last is 0, its first as before (Lin et al. 2023, algorithm 1)."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    alpha_bar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    return 1.0 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
