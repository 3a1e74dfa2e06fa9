"""3×3 convolutions on a CPU, where oneDNN's own way is not the fastest. The numbers are those of the plain layers.

Of small maps, a convolution spends its time on reordering the kernel: it becomes a matrix product. A gradient of a bias
is a sum, which oneDNN takes longer for.

After a nearest-neighbour enlargement by two, the 3×3 pixels under a kernel are 2×2 pixels of the small map: nine
products per input channel do the work of four. Added up beforehand, the kernel is one of 4×4, by which every pixel of
the small map is spread over the large one with stride 2 (Shi et al. 2016, "Is the deconvolution layer the same as a
convolutional layer?", arXiv:1609.07009): 16 multiplications per pixel and pair of channels instead of 36, and no
enlarged map. Forward and backward take a little more than half the time; see docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ldm_cli.core.models.group_norm import group_norm
from ldm_cli.core.models.linear import input_gradient, is_plain, linear, weight_gradient
from ldm_cli.core.models.prepared import prepared, prepared_weights
from ldm_cli.core.models.recompute import is_watched

_SMALL_MAP, _MANY_CHANNELS = 16, 64
"""Up to this many pixels and from this many channels on, a convolution is a matrix product."""

_SMALLEST_TO_DOUBLE = 64
"""Pixels of the small map from which on a transposed convolution saves more than adding up its kernel costs."""

_TAPS = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.float64)
"""[4, 3]: which weights along one side of the 3×3 kernel each weight of the 4×4 kernel is the sum of."""


def norm_silu_conv(x: Tensor, norm: nn.GroupNorm, conv: nn.Conv2d) -> Tensor:
    """`conv(silu(norm(x)))` of x [B, C, H, W] and a 3×3 convolution with padding 1."""
    return conv3x3(F.silu(group_norm(x, norm), inplace=not torch.is_grad_enabled()), conv)


def conv3x3(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """`conv(x)` of x [B, C, H, W] and a 3×3 convolution with padding 1."""
    if is_watched(x) or x.device.type != "cpu":
        plain: Tensor = conv(x)
        return plain
    if not torch.is_grad_enabled():
        return _convolved(x, conv.weight, conv.bias)
    trained: Tensor = _Conv3x3.apply(x, conv.weight, conv.bias)  # type: ignore[no-untyped-call]
    return trained


def upsample_conv(x: Tensor, size: tuple[int, int], conv: nn.Conv2d) -> Tensor:
    """`conv` (3×3, padding 1) of the nearest-neighbour enlargement of x [B, C, H, W] to `size`; keeps x."""
    if _can_double(x, size):
        return _doubled_conv(x, conv.weight, conv.bias)
    if not torch.is_grad_enabled() or is_watched(x):
        plain: Tensor = conv(F.interpolate(x, size=size, mode="nearest"))
        return plain
    trained: Tensor = _UpsampleConv.apply(x, conv.weight, conv.bias, size)  # type: ignore[no-untyped-call]
    return trained


def _can_double(x: Tensor, size: tuple[int, int]) -> bool:
    """Whether `_doubled_conv` computes the enlargement of x [B, C, H, W] to `size` and is the faster way.

    The batch has no say: a picture must come out the same whatever is drawn beside it.
    """
    height, width = x.shape[-2:]
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)  # in half precision the sums would be rounded
        and not torch.is_autocast_enabled("cpu")
        and size == (2 * height, 2 * width)
        and height * width >= _SMALLEST_TO_DOUBLE
    )


def _doubled_conv(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """A 3×3 convolution (padding 1) of the nearest-neighbour enlargement of x by two.

    Args:
        x: [B, C, H, W].
        kernel: [O, C, 3, 3].
        bias: [O] or None.

    Returns:
        [B, O, 2·H, 2·W].
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        trained: Tensor = _DoubledConv.apply(x, kernel, bias)  # type: ignore[no-untyped-call]
        return trained
    spread = prepared(kernel, "spread", lambda: _spread(kernel))
    return F.conv_transpose2d(x, spread, bias, stride=2, padding=1)


class _Conv3x3(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, kernel)
        return _convolved(x, kernel, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, kernel = ctx.saved_tensors
        return _conv_backward(gradients[0], x, kernel, ctx.needs_input_grad)


class _UpsampleConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, shift: Tensor, size: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, kernel)
        ctx.size = size
        return F.conv2d(F.interpolate(x, size=size, mode="nearest"), kernel, shift, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, kernel = ctx.saved_tensors
        enlarged = F.interpolate(x, size=ctx.size, mode="nearest")
        gradient, d_kernel, d_shift = _conv_backward(gradients[0], enlarged, kernel, ctx.needs_input_grad[:3])
        d_x = None if gradient is None else torch.ops.aten.upsample_nearest2d_backward(gradient, ctx.size, x.shape)
        return d_x, d_kernel, d_shift, None


class _DoubledConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        spread = _spread(kernel)
        ctx.save_for_backward(x, spread)
        return F.conv_transpose2d(x, spread, bias, stride=2, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, spread = ctx.saved_tensors
        wants_x, wants_kernel, wants_bias = ctx.needs_input_grad
        gradient = gradients[0]
        d_x, d_spread, _ = torch.ops.aten.convolution_backward(
            gradient, x, spread, None, [2, 2], [1, 1], [1, 1], True, [0, 0], 1, [wants_x, wants_kernel, False]
        )
        d_kernel = _gathered(d_spread) if wants_kernel else None
        return d_x, d_kernel, gradient.sum((0, 2, 3)) if wants_bias else None


def _spread(kernel: Tensor) -> Tensor:
    """[O, C, 3, 3] → [C, O, 4, 4] in channels-last order, the order in which it is wanted.

    The sums are a matrix product over flattened kernels: on the whole a fifth of the time that slices take.
    """
    outputs, channels = kernel.shape[:2]
    flat = kernel.permute(0, 2, 3, 1).reshape(outputs, 9 * channels).t().contiguous()
    taps = torch.kron(_TAPS, _TAPS).to(kernel.dtype)
    return (taps @ flat.view(9, channels * outputs)).view(4, 4, channels, outputs).permute(2, 3, 0, 1)


def _gathered(d_spread: Tensor) -> Tensor:
    """The gradient of `_spread`: [C, O, 4, 4] → [O, C, 3, 3]."""
    channels, outputs = d_spread.shape[:2]
    flat = d_spread.permute(2, 3, 0, 1).reshape(16, channels * outputs)
    taps = torch.kron(_TAPS, _TAPS).to(flat.dtype)
    return (taps.t() @ flat).view(9 * channels, outputs).t().reshape(outputs, 3, 3, channels).permute(0, 3, 1, 2)


def _convolved(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """A 3×3 convolution of padding 1: of a small map one matrix product over its neighbourhoods."""
    if not _is_small(x, kernel):
        return _by_blocks(x, kernel, bias)
    batch, _, height, width = x.shape
    # In another order it is a copy, which would be another weight at every call.
    is_view = _is_channels_last(kernel)
    matrix = _as_matrix(kernel) if is_view else prepared(kernel, "matrix", lambda: _as_matrix(kernel))
    rows = linear(_neighbourhoods(x), matrix, bias)
    return rows.view(batch, height, width, -1).permute(0, 3, 1, 2)


def _by_blocks(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """The same of any map, with the kernel in oneDNN's blocks where what is made of weights is kept."""
    store = prepared_weights()
    # Of a single row, or in another order, torch's own choice is another algorithm.
    if store is None or len(x) == 1 or not _is_channels_last(kernel) or not is_plain(x):
        return F.conv2d(x, kernel, bias, padding=1)
    ones, shape = [1, 1], list(x.shape)
    reorder, convolve = torch.ops.mkldnn._reorder_convolution_weight, torch.ops.mkldnn._convolution_pointwise
    blocks = store.get(kernel, x.shape, lambda: reorder(kernel, ones, ones, ones, 1, shape))
    result: Tensor = convolve(x, blocks, bias, ones, ones, ones, 1, "none", [], "")
    return result


def _is_small(x: Tensor, kernel: Tensor) -> bool:
    return x.device.type == "cpu" and x.shape[2] * x.shape[3] <= _SMALL_MAP and kernel.shape[1] >= _MANY_CHANNELS


def _is_channels_last(kernel: Tensor) -> bool:
    return kernel.is_contiguous(memory_format=torch.channels_last)


def _as_matrix(kernel: Tensor) -> Tensor:
    """[O, C, 3, 3] → [O, 9·C]; a view in channels-last order."""
    return kernel.permute(0, 2, 3, 1).reshape(len(kernel), -1)


def _neighbourhoods(x: Tensor) -> Tensor:
    """The 3×3 neighbourhood of every pixel, zeros outside: [B, C, H, W] → [B·H·W, 9·C]."""
    batch, channels, height, width = x.shape
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    windows = padded.unfold(1, 3, 1).unfold(2, 3, 1).permute(0, 1, 2, 4, 5, 3)
    return windows.reshape(batch * height * width, 9 * channels)


def _conv_backward(
    gradient: Tensor, x: Tensor, kernel: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of a 3×3 convolution of padding 1 for input, kernel and bias, those that are wanted."""
    wants_x, wants_kernel, wants_bias = wanted
    d_bias = gradient.sum((0, 2, 3)) if wants_bias else None  # oneDNN takes longer for it than a sum does
    if not _is_small(x, kernel):
        d_x, d_kernel, _ = torch.ops.aten.convolution_backward(
            gradient, x, kernel, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [wants_x, wants_kernel, False]
        )
        return d_x, d_kernel, d_bias
    rows = gradient.permute(0, 2, 3, 1).reshape(-1, len(kernel))
    d_kernel = None
    if wants_kernel:
        d_kernel = weight_gradient(rows, _neighbourhoods(x)).view(len(kernel), 3, 3, -1).permute(0, 3, 1, 2)
    return _small_input_gradient(rows, kernel, x) if wants_x else None, d_kernel, d_bias


def _small_input_gradient(rows: Tensor, kernel: Tensor, x: Tensor) -> Tensor:
    """Of a small map x, from the gradients of all pixels, [B·H·W, O]."""
    batch, channels, height, width = x.shape
    parts = input_gradient(rows, _as_matrix(kernel)).view(batch, height, width, 3, 3, channels)
    padded = x.new_zeros(batch, height + 2, width + 2, channels)
    for i in range(3):
        for j in range(3):
            padded[:, i : i + height, j : j + width] += parts[:, :, :, i, j]
    return padded[:, 1:-1, 1:-1].permute(0, 3, 1, 2)
