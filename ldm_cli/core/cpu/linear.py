"""Linear layers by oneDNN instead of MKL.

MKL uses half the width of the vector units of AVX-512 processors that are not Intel's; oneDNN's large products are
faster there, in training too (AMD EPYC, Zen 5, two cores: 180 and 390 GFLOP/s).

MKL also adds up the products of a row in an order that depends on the number of rows (1,024 → 256: up to 160 rows,
torch 2.13, AVX-512). oneDNN does not. Without gradients the layer alone therefore decides which one computes, so that a
picture does not depend on its batch; see `sampling/fixed_rows.py`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_LARGE, _LARGE_FOR_SLOW_MKL = 1 << 15, 1 << 11
"""Without gradients, layers of at least so many weights run by oneDNN: on any processor, and where MKL is slow."""
_LARGE_PRODUCT = 1 << 25
"""With gradients, products of at least so many multiplications run by oneDNN; smaller ones lose to its overhead."""
_LONG_SIDE = 256
"""The gradient of a weight with a side of at least this length runs by oneDNN."""


class TunedLinear(nn.Linear):
    """A linear layer by oneDNN where that is faster or keeps results independent of the batch."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] → [..., O]."""
        if not is_plain(input):
            return super().forward(input)
        size = self.weight.numel()
        if torch.is_grad_enabled():
            if input.numel() * self.out_features < _LARGE_PRODUCT or not _mkl_is_slow():
                return super().forward(input)
            trained: Tensor = _Linear.apply(input, self.weight, self.bias)  # type: ignore[no-untyped-call]
            return trained
        if size < _LARGE_FOR_SLOW_MKL or (size < _LARGE and not _mkl_is_slow()):
            return super().forward(input)
        return _by_onednn(input.contiguous(), self.weight, self.bias)


def is_plain(x: Tensor) -> bool:
    """Whether x is float32 on a CPU with oneDNN, outside of autocast and of torch.compile."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    )


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
            _by_onednn(d_y.contiguous(), weight.t(), None).view(x.shape) if wants_x else None,
            _weight_gradient(d_y, x.reshape(len(d_y), -1)) if wants_weight else None,
            d_y.sum(0) if wants_bias else None,
        )


def _weight_gradient(d_y: Tensor, x: Tensor) -> Tensor:
    """The gradient d_yᵀ x of the weight: [M, O] and [M, I] → [O, I]."""
    outputs, inputs = d_y.shape[1], x.shape[1]
    if max(outputs, inputs) < _LONG_SIDE:
        return d_y.t() @ x
    d_y, x = d_y.contiguous(), x.contiguous()
    # oneDNN is faster if the shorter side gives the rows.
    return _by_onednn(d_y.t(), x.t(), None) if outputs <= inputs else _by_onednn(x.t(), d_y.t(), None).t()


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


@cache
def _mkl_is_slow() -> bool:
    """Whether the processor has AVX-512 and is not Intel's. The name decides, not a measurement: every start agrees."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
