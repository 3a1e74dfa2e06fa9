"""A feed-forward layer that keeps little for the backward pass: what is cheap to compute is computed again.

Autograd would keep the result of the GELU and of the product. Here one function spans the pointwise work and the matrix
product after it; its backward repeats the pointwise part. The numbers are those of the plain layers.

Under autocast, in torch.compile (which decides for itself what to keep), on the meta device and without gradients the
plain layers run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_cli.core.models.linear import input_gradient, linear, weight_gradient


def is_watched(x: Tensor) -> bool:
    """Whether torch's own operators are wanted: by autocast, the compiler, or who counts on the meta device."""
    return x.is_meta or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)


def geglu_linear(x: Tensor, proj: nn.Linear, out: nn.Linear) -> Tensor:
    """`out(value · gelu(gate))` where value and gate are the halves of `proj(x)`; keeps x and `proj(x)`.

    Args:
        x: [B, L, D].
        proj: D → 2·I.
        out: I → D.

    Returns:
        [B, L, D].
    """
    if not torch.is_grad_enabled():
        (w_value, w_gate), (b_value, b_gate) = proj.weight.chunk(2), proj.bias.chunk(2)
        return linear(linear(x, w_gate, b_gate, gelu=True).mul_(linear(x, w_value, b_value)), out.weight, out.bias)
    if is_watched(x):
        value, gate = proj(x).chunk(2, dim=-1)
        plain: Tensor = out(value * F.gelu(gate))
        return plain
    result: Tensor = _GegluLinear.apply(x, proj.weight, proj.bias, out.weight, out.bias)  # type: ignore[no-untyped-call]
    return result


class _GegluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor) -> Tensor:
        both = linear(x, w_in, b_in)
        ctx.save_for_backward(x, both, w_in, w_out)
        value, gate = both.chunk(2, dim=-1)
        return linear(F.gelu(gate).mul_(value), w_out, b_out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, both, w_in, w_out = ctx.saved_tensors
        d_y = gradients[0].flatten(0, -2)
        value, gate = both.flatten(0, -2).chunk(2, dim=-1)
        activated = F.gelu(gate)
        d_hidden = input_gradient(d_y, w_out)
        d_both = torch.empty_like(both).flatten(0, -2)
        d_value, d_gate = d_both.chunk(2, dim=-1)
        torch.mul(d_hidden, activated, out=d_value)
        torch.ops.aten.gelu_backward.grad_input(d_hidden.mul_(value), gate, grad_input=d_gate)
        d_w_out = weight_gradient(d_y, activated.mul_(value))
        d_w_in = weight_gradient(d_both, x.flatten(0, -2))
        return input_gradient(d_both, w_in).view(x.shape), d_w_in, d_both.sum(0), d_w_out, d_y.sum(0)
