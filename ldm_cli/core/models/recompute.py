"""Layers that keep little for the backward pass: what is cheap to compute is computed again.

Autograd would keep the result of every SiLU, GELU, product and enlargement. Here one function spans the pointwise work
and the convolution or matrix product after it; its backward repeats the pointwise part. A group norm is not cheap: in
channels-last order it takes three to six times as long as the SiLU.
The numbers are those of the plain layers, forward and backward. Measured on a U-Net of 12.6 M parameters: see
docs/performance.md.

Under autocast, in torch.compile (which decides for itself what to keep), on the meta device and without gradients the
plain layers run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_cli.core.models.doubling import can_double, doubled_conv
from ldm_cli.core.models.linear import input_gradient, linear, weight_gradient

# Up to this many pixels and from this many channels on, oneDNN's convolution spends its time on reordering the kernel.
_SMALL_MAP, _MANY_CHANNELS = 16, 64
# From this many pixels on, and up to this many channels a group, torch's group norm takes long for its gradient.
_LARGE_MAP, _NARROW_GROUP = 1024, 4


def norm_silu_conv(x: Tensor, norm: nn.GroupNorm, conv: nn.Conv2d) -> Tensor:
    """`conv(silu(norm(x)))` of a 3×3 convolution with padding 1; keeps x [B, C, H, W] and norm(x)."""
    if _is_watched(x):
        projected: Tensor = conv(F.silu(norm(x)))
        return projected
    if not torch.is_grad_enabled():
        return _conv3x3(F.silu(norm(x), inplace=True), conv.weight, conv.bias)
    result: Tensor = _NormSiluConv.apply(x, norm.weight, norm.bias, conv.weight, conv.bias, norm.num_groups, norm.eps)  # type: ignore[no-untyped-call]
    return result


def upsample_conv(x: Tensor, size: tuple[int, int], conv: nn.Conv2d) -> Tensor:
    """`conv` (3×3, padding 1) of the nearest-neighbour enlargement of x [B, C, H, W] to `size`; keeps x."""
    if can_double(x, size):
        return doubled_conv(x, conv.weight, conv.bias)
    if _plain(x):
        enlarged: Tensor = conv(F.interpolate(x, size=size, mode="nearest"))
        return enlarged
    result: Tensor = _UpsampleConv.apply(x, conv.weight, conv.bias, size)  # type: ignore[no-untyped-call]
    return result


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
    if _plain(x):
        value, gate = proj(x).chunk(2, dim=-1)
        plain: Tensor = out(value * F.gelu(gate))
        return plain
    result: Tensor = _GegluLinear.apply(x, proj.weight, proj.bias, out.weight, out.bias)  # type: ignore[no-untyped-call]
    return result


def _plain(x: Tensor) -> bool:
    return not torch.is_grad_enabled() or _is_watched(x)


def _is_watched(x: Tensor) -> bool:
    """Whether torch's own operators are wanted: by autocast, the compiler, or who counts on the meta device."""
    return x.is_meta or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)


def _order(x: Tensor) -> torch.memory_format:
    """The memory order of x [B, C, H, W], or the nearest to it."""
    return torch.channels_last if x.stride(1) == 1 and x.shape[1] > 1 else torch.contiguous_format


class _NormSiluConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, bias: Tensor, kernel: Tensor, shift: Tensor, groups: int, eps: float
    ) -> Tensor:
        x = x.contiguous(memory_format=_order(x))
        size = (len(x), x.shape[1], x.shape[2] * x.shape[3])
        hidden, mean, rstd = torch.native_group_norm(x, gain, bias, size[0], size[1], size[2], groups, eps)
        ctx.save_for_backward(x, hidden, gain, kernel, mean, rstd)
        ctx.size, ctx.groups = size, groups
        return _conv3x3(F.silu(hidden), kernel, shift)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, normed, gain, kernel, mean, rstd = ctx.saved_tensors
        gradient, d_kernel, d_shift = _conv_backward(gradients[0], F.silu(normed), kernel)
        # The kernels of a group norm read the gradient in the order of its input, whatever its own is.
        gradient = torch.ops.aten.silu_backward(gradient, normed).contiguous(memory_format=_order(x))
        if _has_narrow_groups(x, ctx.groups):
            d_x, d_gain, d_bias = _group_norm_backward(gradient, x, mean, rstd, gain)
        else:
            d_x, d_gain, d_bias = torch.ops.aten.native_group_norm_backward(
                gradient, x, mean, rstd, gain, *ctx.size, ctx.groups, [ctx.needs_input_grad[0], True, True]
            )
        return d_x, d_gain, d_bias, d_kernel, d_shift, None, None


def _has_narrow_groups(x: Tensor, groups: int) -> bool:
    """Whether torch's backward pass of a group norm would go over large maps in steps of a few channels."""
    return (
        x.device.type == "cpu"
        and _order(x) == torch.channels_last
        and x.shape[2] * x.shape[3] >= _LARGE_MAP
        and x.shape[1] // groups <= _NARROW_GROUP
    )


def _group_norm_backward(gradient: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, gain: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a group norm for its input, gain and bias, in passes over all channels of a pixel.

    With x̂ = (x − μ) / σ and γ the gain, d_x = (γ d_y − mean(γ d_y) − x̂ mean(γ d_y x̂)) / σ, means over the group.

    Args:
        gradient: d_y, [B, C, H, W] in channels-last order, as x is.
        mean, rstd: μ and 1 / σ, [B, G].
        gain: [C].
    """
    batch, channels, height, width = x.shape
    groups = mean.shape[1]
    per_group = (batch, groups, channels // groups)
    pixels = height * width * per_group[2]
    d_y, pixels_of_x = (t.permute(0, 2, 3, 1).reshape(batch, -1, channels) for t in (gradient, x))

    product = d_y * pixels_of_x
    along_x, total = product.sum(1), d_y.sum(1)  # [B, C]
    weighted_x = (along_x * gain).view(per_group).sum(2)
    weighted = (total * gain).view(per_group).sum(2)
    # d_x is linear in d_y and x, with coefficients per channel and per group.
    of_x = (weighted * mean - weighted_x) * rstd**3 / pixels
    constant = -of_x * mean - weighted * rstd / pixels
    of_gradient = (rstd[:, :, None] * gain.view(groups, -1)).view(batch, 1, channels)
    of_x, constant = (c[:, :, None].expand(per_group).reshape(batch, 1, channels) for c in (of_x, constant))
    d_x = torch.addcmul(constant, pixels_of_x, of_x, out=product).addcmul_(d_y, of_gradient)
    d_gain = ((along_x.view(per_group) - total.view(per_group) * mean[:, :, None]) * rstd[:, :, None]).sum(0)
    return d_x.view(batch, height, width, channels).permute(0, 3, 1, 2), d_gain.view(channels), total.sum(0)


class _UpsampleConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, shift: Tensor, size: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, kernel)
        ctx.size = size
        return F.conv2d(F.interpolate(x, size=size, mode="nearest"), kernel, shift, padding=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, kernel = ctx.saved_tensors
        enlarged = F.interpolate(x, size=ctx.size, mode="nearest")
        gradient, d_kernel, d_shift = _conv_backward(gradients[0], enlarged, kernel)
        d_x = torch.ops.aten.upsample_nearest2d_backward(gradient, ctx.size, x.shape)
        return d_x, d_kernel, d_shift, None


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


def _conv3x3(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """A 3×3 convolution of padding 1: of a small map one matrix product over its neighbourhoods."""
    if not _is_small(x, kernel):
        return F.conv2d(x, kernel, bias, padding=1)
    batch, _, height, width = x.shape
    rows = linear(_neighbourhoods(x), _as_matrix(kernel), bias)
    return rows.view(batch, height, width, -1).permute(0, 3, 1, 2)


def _is_small(x: Tensor, kernel: Tensor) -> bool:
    return x.device.type == "cpu" and x.shape[2] * x.shape[3] <= _SMALL_MAP and kernel.shape[1] >= _MANY_CHANNELS


def _as_matrix(kernel: Tensor) -> Tensor:
    """[O, C, 3, 3] → [O, 9·C]; a view in channels-last order."""
    return kernel.permute(0, 2, 3, 1).reshape(len(kernel), -1)


def _neighbourhoods(x: Tensor) -> Tensor:
    """The 3×3 neighbourhood of every pixel, zeros outside: [B, C, H, W] → [B·H·W, 9·C]."""
    batch, channels, height, width = x.shape
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    windows = padded.unfold(1, 3, 1).unfold(2, 3, 1).permute(0, 1, 2, 4, 5, 3)
    return windows.reshape(batch * height * width, 9 * channels)


def _conv_backward(gradient: Tensor, x: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a 3×3 convolution of padding 1 with a bias, for input, kernel and bias."""
    if not _is_small(x, kernel):
        d_x, d_kernel, d_bias = torch.ops.aten.convolution_backward(
            gradient, x, kernel, [len(kernel)], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, True]
        )
        return d_x, d_kernel, d_bias
    batch, channels, height, width = x.shape
    rows = gradient.permute(0, 2, 3, 1).reshape(-1, len(kernel))
    d_kernel = weight_gradient(rows, _neighbourhoods(x)).view(len(kernel), 3, 3, channels).permute(0, 3, 1, 2)
    parts = input_gradient(rows, _as_matrix(kernel)).view(batch, height, width, 3, 3, channels)
    padded = x.new_zeros(batch, height + 2, width + 2, channels)
    for i in range(3):
        for j in range(3):
            padded[:, i : i + height, j : j + width] += parts[:, :, :, i, j]
    return padded[:, 1:-1, 1:-1].permute(0, 3, 1, 2), d_kernel, rows.sum(0)
