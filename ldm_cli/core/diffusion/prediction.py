"""From what the network predicts to x_0 and ε, where x_t = a x_0 + b ε.

epsilon         x_0 = (x_t − b ε) / a
v_prediction    x_0 = a x_t − b v,   ε = b x_t + a v,   if a² + b² = 1  (Salimans & Ho 2022, app. D, arXiv:2202.00512)
sample          ε = (x_t − a x_0) / b
flow_prediction x_0 = x_t − b u,     ε = x_t + a u,     if a + b = 1      (Lipman et al. 2023, arXiv:2210.02747)

with v = a ε − b x_0 and the velocity u = ε − x_0 of the straight line from x_0 to ε.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

Number = TypeVar("Number", float, Tensor)


def to_x0(output: Tensor, x_t: Tensor, signal: Number, sigma: Number, prediction_type: str) -> Tensor:
    """The clean sample x_0 that a network output stands for.

    Args:
        output, x_t: [B, …].
        signal, sigma: a and b, numbers or tensors that broadcast with x_t.
        prediction_type: `epsilon`, `v_prediction`, `sample` or `flow_prediction`.

    Raises:
        ValueError: unknown `prediction_type`, or ε-prediction at zero signal, which says nothing of x_0.
    """
    if prediction_type == "sample":
        return output
    if prediction_type == "v_prediction":
        return signal * x_t - sigma * output
    if prediction_type == "flow_prediction":
        return x_t - sigma * output
    if prediction_type == "epsilon":
        if isinstance(signal, float) and signal == 0.0:
            raise ValueError(f"prediction_type='epsilon' at signal={signal}: x_0 is undetermined")
        return (x_t - sigma * output) / signal
    raise ValueError(_unknown(prediction_type))


def to_epsilon(output: Tensor, x_t: Tensor, signal: Number, sigma: Number, prediction_type: str) -> Tensor:
    """The noise ε that a network output stands for; arguments as in `to_x0`.

    Raises:
        ValueError: unknown `prediction_type`.
    """
    if prediction_type == "epsilon":
        return output
    if prediction_type == "v_prediction":
        return sigma * x_t + signal * output
    if prediction_type == "flow_prediction":
        return x_t + signal * output
    if prediction_type == "sample":
        return (x_t - signal * output) / sigma
    raise ValueError(_unknown(prediction_type))


def _unknown(prediction_type: str) -> str:
    return f"prediction_type={prediction_type!r} is not 'epsilon', 'v_prediction', 'sample' or 'flow_prediction'"
