"""Enlarging to twice the size and convolving, in one transposed convolution, on a CPU.

After a nearest-neighbour enlargement by two, the 3×3 pixels under a kernel are 2×2 pixels of the small map: nine
products per input channel do the work of four. Added up beforehand, the kernel is one of 4×4, by which every pixel of
the small map is spread over the large one with stride 2 (Shi et al. 2016, "Is the deconvolution layer the same as a
convolutional layer?", arXiv 1609.07009): 16 multiplications per pixel and pair of channels instead of 36, and no
enlarged map. Forward and backward take a little more than half the time; see docs/performance.md.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_SMALLEST_MAP = 64
"""Pixels of the small map from which on the convolution saves more than adding up its kernel costs."""

_TAPS = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.float64)
"""[4, 3]: which weights along one side of the 3×3 kernel each weight of the 4×4 kernel is the sum of."""


def can_double(x: Tensor, size: tuple[int, int]) -> bool:
    """Whether `doubled_conv` computes the enlargement of x [B, C, H, W] to `size` and is the faster way.

    The batch has no say: a picture must come out the same whatever is drawn beside it.
    """
    height, width = x.shape[-2:]
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)  # in half precision the sums would be rounded
        and not torch.is_autocast_enabled("cpu")
        and size == (2 * height, 2 * width)
        and height * width >= _SMALLEST_MAP
    )


def doubled_conv(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """A 3×3 convolution (padding 1) of the nearest-neighbour enlargement of x by two.

    Args:
        x: [B, C, H, W].
        kernel: [O, C, 3, 3].
        bias: [O] or None.

    Returns:
        [B, O, 2·H, 2·W].
    """
    return F.conv_transpose2d(x, _spread(kernel), bias, stride=2, padding=1)


def _spread(kernel: Tensor) -> Tensor:
    """[O, C, 3, 3] → [C, O, 4, 4] in channels-last order, the order in which it is wanted.

    The sums are a matrix product over flattened kernels: on the whole a fifth of the time that slices take.
    """
    outputs, channels = kernel.shape[:2]
    taps = torch.kron(_TAPS, _TAPS).to(kernel.dtype)
    flat = kernel.permute(0, 2, 3, 1).reshape(outputs, 9 * channels).t().contiguous()
    return (taps @ flat.view(9, channels * outputs)).view(4, 4, channels, outputs).permute(2, 3, 0, 1)
