"""The forward process: how much signal and how much noise each discrete level holds.

x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε,   ᾱ_t = Π_{s ≤ t} (1 − β_s)        (Ho et al. 2020, eq. 4, arXiv:2006.11239)
SNR(t) = ᾱ_t / (1 − ᾱ_t)                                           (Kingma et al. 2021, arXiv:2107.00630)
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
    """T noise levels, t = 0 (almost clean) … T − 1 (almost, or with zero SNR exactly, pure noise).

    Attributes:
        betas: variances β_t, float64 [T], in (0, 1].
        alphas_cumprod: ᾱ_t, the share of the signal's variance, float64 [T], falling, in [0, 1).
        prediction_type: what the network predicts: `epsilon`, `v_prediction` or `sample`.
    """

    betas: Tensor
    alphas_cumprod: Tensor
    prediction_type: str

    @classmethod
    def from_config(cls, config: DiffusionConfig) -> NoiseSchedule:
        """The schedule that a recipe, or a diffusers scheduler_config.json, describes."""
        betas = _betas(config)
        if config.rescale_betas_zero_snr:
            betas = _with_zero_terminal_snr(betas)
        # In float32, one product after the other: these rounded numbers, not the ideal ones, are what
        # published models were trained with, and near t = 0 rounding moves 1 − ᾱ by 1e-4 of itself. Then
        # float64, so that the coefficients made of them lose nothing more.
        alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
        return cls(betas.double(), alphas_cumprod.double(), config.prediction_type)

    @property
    def num_timesteps(self) -> int:
        """The number of levels T."""
        return len(self.alphas_cumprod)

    def signal_and_noise(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ_t and √(1 − ᾱ_t) as [B, 1, …], shaped and typed to be multiplied with `like` [B, …].

        Args:
            t: int64 [B], levels in [0, T).
            like: any tensor [B, …]; gives device, type and number of dimensions.
        """
        if t.shape != like.shape[:1]:
            raise ValueError(f"timesteps of shape {tuple(t.shape)} for a batch of shape {tuple(like.shape)}")
        alpha_bar = self.alphas_cumprod.to(like.device)[t].reshape(-1, *[1] * (like.ndim - 1))
        return alpha_bar.sqrt().to(like.dtype), (1.0 - alpha_bar).sqrt().to(like.dtype)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε, of x0's shape and type.

        Args:
            x0, noise: [B, …].
            t: int64 [B].
        """
        signal, sigma = self.signal_and_noise(t, x0)
        return signal * x0 + sigma * noise

    def velocity(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """v_t = √ᾱ_t ε − √(1 − ᾱ_t) x_0, of x0's shape and type (Salimans & Ho 2022, arXiv:2202.00512)."""
        signal, sigma = self.signal_and_noise(t, x0)
        return signal * noise - sigma * x0

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should output for x_t: ε, v or x_0, [B, …]."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "v_prediction":
            return self.velocity(x0, noise, t)
        return x0

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio ᾱ_t / (1 − ᾱ_t), float64 of t's shape; 0 at the last zero-SNR level."""
        alpha_bar = self.alphas_cumprod.to(t.device)[t]
        return alpha_bar / (1.0 - alpha_bar)


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
