"""The training objective: noised samples, and the weighted squared error of a prediction, one number per sample.

The unweighted loss is the mean squared error to the target (Ho et al. 2020, eq. 14). With min-SNR-γ weights, levels
with zero signal are not trained: there the weights of v, x_0 and u are 0.
"""

from __future__ import annotations

from torch import Tensor

from ldm_cli.core.diffusion.prediction import Prediction


def add_noise(x0: Tensor, noise: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x_t = a x_0 + b ε, of x0's shape and type.

    Args:
        x0, noise: [B, …].
        a, b: levels, [B].
    """
    return _per_sample(a, x0) * x0 + _per_sample(b, x0) * noise


def diffusion_loss(
    prediction: Prediction,
    model_output: Tensor,
    x0: Tensor,
    noise: Tensor,
    a: Tensor,
    b: Tensor,
    snr_gamma: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Weighted mean squared error of the network's prediction, float32 [B].

    The mean is that over all positions, masked or not: a position counts the same however many others do.

    Args:
        model_output: network output for `add_noise(x0, noise, a, b)`, [B, …].
        x0, noise: [B, …].
        a, b: levels, [B].
        snr_gamma: γ of the min-SNR weights; None weighs every level alike.
        mask: how much each position counts, 0 … 1, [B, 1, …]; None: all in full. Where it is 0 the gradient is 0.
    """
    target = prediction.target(x0, noise, _per_sample(a, x0), _per_sample(b, x0))
    # In float32 whatever autocast did: squares of half-precision errors lose their small values.
    squares = (model_output.float() - target.float()).square()
    loss = (squares if mask is None else squares * mask).flatten(1).mean(dim=1)
    if snr_gamma is None:
        return loss
    return loss * prediction.min_snr_weight(a, b, snr_gamma).to(loss.dtype)


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Values [B] as [B, 1, …], shaped and typed to be multiplied with `like` [B, …]."""
    if values.shape != like.shape[:1]:
        raise ValueError(f"levels of shape {tuple(values.shape)} for a batch of shape {tuple(like.shape)}")
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))
