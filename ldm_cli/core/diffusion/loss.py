"""The denoising loss, one number per sample, with min-SNR-γ weights.

The unweighted loss is the mean squared error to the target (Ho et al. 2020, eq. 14). An error in ε, v and x_0
differs by a factor that depends on the level only,

    |ε − ε̂|² = SNR |x_0 − x̂_0|²,   |v − v̂|² = (SNR + 1) |x_0 − x̂_0|²,   |u − û|² = (√SNR + 1)² |x_0 − x̂_0|²,

so that the one weight min(SNR, γ) on |x_0 − x̂_0|² (Hang et al. 2023, eq. 6, arXiv:2303.09556) becomes

    epsilon: min(SNR, γ) / SNR      v_prediction: min(SNR, γ) / (SNR + 1)
    sample: min(SNR, γ)             flow_prediction: min(SNR, γ) / (√SNR + 1)².

At the last level of a zero-SNR or flow schedule the weights of v, x_0 and u are 0: with min-SNR-γ that level is
not trained.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm_cli.core.diffusion.schedule import NoiseSchedule


def min_snr_weight(snr: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Weight of the squared error of this prediction type, of the shape and type of `snr`.

    Raises:
        ValueError: unknown `prediction_type`.
    """
    capped = snr.clamp(max=gamma)
    if prediction_type == "epsilon":
        return torch.clamp(gamma / snr, max=1.0)  # capped / snr, without 0/0 at zero SNR
    if prediction_type == "v_prediction":
        return capped / (snr + 1.0)
    if prediction_type == "sample":
        return capped
    if prediction_type == "flow_prediction":
        return capped / (snr.sqrt() + 1.0) ** 2
    raise ValueError(
        f"prediction_type={prediction_type!r} is not 'epsilon', 'v_prediction', 'sample' or 'flow_prediction'"
    )


def diffusion_loss(
    schedule: NoiseSchedule,
    model_output: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    snr_gamma: float | None = None,
) -> Tensor:
    """Weighted mean squared error of the network's prediction, float32 [B].

    Args:
        schedule: says what is predicted.
        model_output: network output for `schedule.add_noise(x0, noise, t)`, [B, …].
        x0, noise: [B, …].
        t: int64 [B].
        snr_gamma: γ of the min-SNR weights; None weighs every level alike.
    """
    # In float32 whatever autocast did: squares of half-precision errors lose their small values.
    error = model_output.float() - schedule.target(x0, noise, t).float()
    per_sample = error.square().flatten(1).mean(dim=1)
    if snr_gamma is None:
        return per_sample
    return per_sample * min_snr_weight(schedule.snr(t), snr_gamma, schedule.prediction_type).to(per_sample.dtype)
