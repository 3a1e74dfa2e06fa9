"""The variance schedules of diffusion models: β_t, and the signal share ᾱ_t = Π_{s ≤ t} (1 − β_s)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm_cli.core.diffusion.config import DiffusionConfig

_MAX_BETA = 0.999


def alphas_cumprod(config: DiffusionConfig) -> Tensor:
    """ᾱ_t, float64 [T], falling, in [0, 1): the last is 0 with `rescale_betas_zero_snr`."""
    betas = _betas(config)
    if config.rescale_betas_zero_snr:
        betas = _with_zero_terminal_snr(betas)
    # In float32, one product after the other: published models were trained with these rounded numbers, and near
    # t = 0 rounding moves 1 − ᾱ by 1e-4 of itself. Then float64: the coefficients made of them lose nothing more.
    return torch.cumprod(1.0 - betas, dim=0).double()


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
