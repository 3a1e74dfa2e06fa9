"""Pictures larger than a network can take: overlapping windows, each through the network, blended where they overlap.

For the denoiser this is MultiDiffusion (Bar-Tal et al. 2023, eq. 5, arXiv:2302.08113): each window's prediction is that
of a picture of its own, and their weighted mean is the picture that fits all of them best.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def window_starts(length: int, window: int, overlap: int) -> list[int]:
    """Where windows begin that cover [0, length), the last flush with its end.

    >>> window_starts(20, 8, 4)
    [0, 4, 8, 12]

    Raises:
        ValueError: the overlap is not less than the window.
    """
    if not 0 <= overlap < window:
        raise ValueError(f"window_starts: overlap={overlap} with window={window}")
    if length <= window:
        return [0]
    return [*range(0, length - window, window - overlap), length - window]


def tiled(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    window: int,
    overlap: int,
    in_scale: int = 1,
    out_scale: int = 1,
) -> Tensor:
    """`function` of x, window by window.

    Args:
        function: [B, C, h · in_scale, w · in_scale] → [B, C', h · out_scale, w · out_scale].
        x: [B, C, h · in_scale, w · in_scale].
        window: side of a window, in units of h and w.
        overlap: least overlap of neighbours, in the same units.
        in_scale, out_scale: pixels per unit before and after.

    Returns:
        float32 [B, C', h · out_scale, w · out_scale]; just `function(x)` where x fits into one window.
    """
    height, width = x.shape[-2] // in_scale, x.shape[-1] // in_scale
    if max(height, width) <= window:
        return function(x)
    total, weights = torch.zeros(()), torch.zeros(())
    for top in window_starts(height, window, overlap):
        for left in window_starts(width, window, overlap):
            bottom, right = min(top + window, height), min(left + window, width)
            rows = slice(top * in_scale, bottom * in_scale)
            columns = slice(left * in_scale, right * in_scale)
            part = function(x[..., rows, columns].contiguous()).float()
            if total.ndim == 0:
                total = part.new_zeros(*part.shape[:2], height * out_scale, width * out_scale)
                weights = part.new_zeros(total.shape[-2:])
            weight = _tent(part.shape[-2], part)[:, None] * _tent(part.shape[-1], part)
            area = (..., slice(top * out_scale, bottom * out_scale), slice(left * out_scale, right * out_scale))
            total[area] += weight * part
            weights[area] += weight
    return total / weights


def _tent(size: int, like: Tensor) -> Tensor:
    """Weights that fall from the middle to the edges but stay positive, [size]."""
    rising = torch.arange(1, size + 1, dtype=torch.float32, device=like.device)
    return torch.minimum(rising, rising.flip(0)) / size


def in_parts(
    function: Callable[[Tensor], Tensor], x: Tensor, window: int | None, in_scale: int, out_scale: int
) -> Tensor:
    """`function` of a picture or its latents, in windows that overlap by a quarter if they are given; see `tiled`."""
    if window is None:
        return function(x)
    return tiled(function, x, window, window // 4, in_scale, out_scale)
