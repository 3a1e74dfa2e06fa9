"""From what the network predicts (ε, v or x_0) to x_0 and ε, where x_t = a x_0 + b ε and a² + b² = 1.

epsilon       x_0 = (x_t − b ε) / a
v_prediction  x_0 = a x_t − b v,   ε = b x_t + a v      (Salimans & Ho 2022, appendix D, arXiv:2202.00512)
sample        ε = (x_t − a x_0) / b
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

Number = TypeVar("Number", float, Tensor)


def to_x0(output: Tensor, x_t: Tensor, signal: Number, sigma: Number, prediction_type: str) -> Tensor:
    """The clean sample x_0 that a network output stands for.

    Args:
        output, x_t: [B, …].
        signal, sigma: a = √ᾱ_t and b = √(1 − ᾱ_t), numbers or tensors that broadcast with x_t.
        prediction_type: `epsilon`, `v_prediction` or `sample`.

    Raises:
        ValueError: unknown `prediction_type`, or ε-prediction at zero signal, which says nothing of x_0.
    """
    if prediction_type == "sample":
        return output
    if prediction_type == "v_prediction":
        return signal * x_t - sigma * output
    if prediction_type == "epsilon":
        if isinstance(signal, float) and signal == 0.0:
            raise ValueError(f"prediction_type='epsilon' at signal={signal}: x_0 is undetermined")
        return (x_t - sigma * output) / signal
    raise ValueError(f"prediction_type={prediction_type!r} is not 'epsilon', 'v_prediction' or 'sample'")


def to_epsilon(output: Tensor, x_t: Tensor, signal: Number, sigma: Number, prediction_type: str) -> Tensor:
    """The noise ε that a network output stands for; arguments as in `to_x0`.

    Raises:
        ValueError: unknown `prediction_type`.
    """
    if prediction_type == "epsilon":
        return output
    if prediction_type == "v_prediction":
        return sigma * x_t + signal * output
    if prediction_type == "sample":
        return (x_t - signal * output) / sigma
    raise ValueError(f"prediction_type={prediction_type!r} is not 'epsilon', 'v_prediction' or 'sample'")
