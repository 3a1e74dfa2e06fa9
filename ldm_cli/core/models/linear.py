"""Linear layers on a CPU: where it is faster, or where the batch must not matter, by oneDNN instead of MKL.

Without autograd, large layers: where rows are few, MKL adds up each in an order that depends on their number (1,024 →
256: up to 160 rows, torch 2.13, AVX-512). oneDNN does not, adds the bias without a pass of its own, and applies GELU on
the way. Calling it costs more, so that small layers are left to MKL. Why the batch must not matter:
`sampling/fixed_rows.py`.

On AVX-512 processors that are not Intel's, in training too: MKL uses half of their vector units' width there, and
oneDNN's products are twice as fast (AMD EPYC, Zen 5: 180 and 390 GFLOP/s on two cores).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ldm_cli.core.models.prepared import prepared_weights

_LARGE = 1 << 15
"""Weights from which on a layer is large: a matter of the layer alone, not of its input."""
_LARGE_FOR_SLOW_MKL = 1 << 11
_LONG_SIDE = 256
"""Side of a kernel from which on oneDNN is the faster one for its gradient, a product with a long inner side."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, gelu: bool = False) -> Tensor:
    """x Wᵀ + b, or the GELU of it: [..., I] and [O, I] → [..., O]."""
    if is_plain(x):
        if torch.is_grad_enabled():
            if not gelu and _favours_onednn(weight):
                trained: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
                return trained
        elif gelu or weight.numel() >= _LARGE or _favours_onednn(weight):
            x = x.contiguous()
            return _by_onednn(x, _in_blocks(weight, x.numel() // x.shape[-1]), bias, gelu=gelu)
    result = F.linear(x, weight, bias)
    return F.gelu(result) if gelu else result


def input_gradient(d_y: Tensor, weight: Tensor) -> Tensor:
    """The gradient d_y W of a linear layer's input, without autograd: [M, O] and [O, I] → [M, I]."""
    if is_plain(d_y) and _favours_onednn(weight):
        return _by_onednn(d_y.contiguous(), weight.t(), None)
    return d_y @ weight


def weight_gradient(d_y: Tensor, x: Tensor) -> Tensor:
    """The gradient d_yᵀ x of a linear layer's weight, without autograd: [M, O] and [M, I] → [O, I]."""
    outputs, inputs = d_y.shape[1], x.shape[1]
    if is_plain(x) and max(outputs, inputs) >= _LONG_SIDE and _mkl_is_slow():
        d_y, x = d_y.contiguous(), x.contiguous()
        # The shorter side is the one that is taken in rows.
        return _by_onednn(d_y.t(), x.t(), None) if outputs <= inputs else _by_onednn(x.t(), d_y.t(), None).t()
    return d_y.t() @ x


class Linear(nn.Linear):
    """torch's linear layer, computed as above."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] → [..., O]."""
        return linear(input, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _by_onednn(x.contiguous(), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        d_y = gradients[0].reshape(-1, len(weight))
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            input_gradient(d_y, weight).view(x.shape) if wants_x else None,
            weight_gradient(d_y, x.reshape(len(d_y), -1)) if wants_weight else None,
            d_y.sum(0) if wants_bias else None,
        )


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None, *, gelu: bool = False) -> Tensor:
    name, variant = ("gelu", "none") if gelu else ("none", "")
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], variant)
    return result


def _in_blocks(weight: Tensor, rows: int) -> Tensor:
    """A weight as oneDNN multiplies so many rows with it, where what is made of weights is kept."""
    store = prepared_weights()
    if store is None:
        return weight
    return store.get(weight, rows, lambda: torch.ops.mkldnn._reorder_linear_weight(weight, rows))


def is_plain(x: Tensor) -> bool:
    """Whether x is float32 on a CPU with oneDNN, and nothing looks on that wants torch's own operators."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    )


def _favours_onednn(weight: Tensor) -> bool:
    return weight.numel() >= _LARGE_FOR_SLOW_MKL and _mkl_is_slow()


@cache
def _mkl_is_slow() -> bool:
    """Whether the processor has AVX-512 and MKL does not use it: by the maker's name, so that every start agrees."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
