"""Linear layers without autograd, on a CPU: large ones by oneDNN, whose sums do not depend on the batch.

Where rows are few, MKL adds up each in an order that depends on their number (1,024 → 256: up to 160 rows, torch
2.13, AVX-512). oneDNN does not, adds the bias without a pass of its own, and applies GELU on the way. Calling it costs
more, so that small layers are left to MKL. Why the batch must not matter: `sampling/fixed_rows.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LARGE = 1 << 15
"""Weights from which on a layer is large: a matter of the layer alone, not of its input."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, gelu: bool = False) -> Tensor:
    """x Wᵀ + b, or the GELU of it: [..., I] and [O, I] → [..., O]."""
    if (gelu or weight.numel() >= _LARGE) and _is_plain(x):
        name, variant = ("gelu", "none") if gelu else ("none", "")
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, name, [], variant)
        return result
    product = F.linear(x, weight, bias)
    return F.gelu(product) if gelu else product


def _is_plain(x: Tensor) -> bool:
    """Whether x is float32 on a CPU and nobody looks on: a network draws, or a function has a backward of its own."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    )


class Linear(nn.Linear):
    """torch's linear layer, computed as above."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] → [..., O]."""
        return linear(input, self.weight, self.bias)
