"""Pictures larger than a network can take: overlapping windows, each through the network, blended where they overlap.

For the denoiser this is MultiDiffusion (Bar-Tal et al. 2023, eq. 5, arXiv:2302.08113): each window's prediction is that
of a picture of its own, and their weighted mean is the picture that fits all of them best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm_cli.core.window import Window

_PADDED_SHARE = 1 / 16
"""Of a window's side: how far from its ends a network's result depends on the padding."""


def window_starts(length: int, window: int, overlap: int, multiple: int = 1) -> list[int]:
    """Where windows begin that cover [0, length): evenly spread multiples; the last window reaches the end.

    >>> window_starts(20, 8, 4)
    [0, 4, 8, 12]

    Args:
        length: to be covered.
        window: length of a window; the last one is longer by less than `multiple`.
        overlap: least overlap of neighbours.
        multiple: divides all starts.

    Raises:
        ValueError: the overlap is not less than the window, or leaves no step of `multiple`.
    """
    step = (window - overlap) // multiple
    if overlap < 0 or step < 1:
        raise ValueError(f"window_starts: overlap={overlap} with window={window} and multiple={multiple}")
    last = max(0, length - window) // multiple
    num_steps = -(-last // step)
    return [last * i // max(1, num_steps) * multiple for i in range(num_steps + 1)]


def windows(height: int, width: int, window: int, overlap: int, multiple: int = 1) -> list[Window]:
    """Squares of side `window`, or what there is of it, that cover height × width; more in `window_starts`.

    With an overlap of 0 none of them overlap: each ends where the next one begins.
    """

    def pieces(length: int) -> list[tuple[int, int]]:
        starts = window_starts(length, window, overlap, multiple)
        ends = [start + window for start in starts[:-1]] if overlap else starts[1:]
        return [(start, end - start) for start, end in zip(starts, [*ends, length], strict=True)]

    return [Window(top, left, rows, columns) for top, rows in pieces(height) for left, columns in pieces(width)]


def strips(parts: Iterable[tuple[Window, Tensor]], height: int, width: int) -> Iterator[Tensor]:
    """A picture of parts, [B, C, …] each, blended where they overlap: strips float32 [B, C, …, width], from the top.

    A strip is given as soon as no further part reaches it. The parts come in the order of `windows`.
    """
    top, total, weights = 0, torch.zeros(()), torch.zeros(())
    for window, part in parts:
        if total.ndim == 0:
            total = part.new_zeros(*part.shape[:2], 0, width, dtype=torch.float32)
            weights = total.new_zeros(0, width)
        if num_complete := window.top - top:
            yield total[..., :num_complete, :] / weights[:num_complete]
            total, weights, top = total[..., num_complete:, :], weights[num_complete:], window.top
        if missing := window.height - len(weights):
            total, weights = F.pad(total, (0, 0, 0, missing)), F.pad(weights, (0, 0, 0, missing))
        rows = _tent(window.top, window.height, height, total)
        weight = rows[:, None] * _tent(window.left, window.width, width, total)
        area = replace(window, top=0).area
        total[area] += weight * part.float()
        weights[area] += weight
    yield total / weights


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
    parts = (
        (part.scaled(out_scale), function(x[part.scaled(in_scale).area].contiguous()))
        for part in windows(height, width, window, overlap)
    )
    return torch.cat(list(strips(parts, height * out_scale, width * out_scale)), dim=-2)


def _tent(start: int, size: int, length: int, like: Tensor) -> Tensor:
    """Weights of a window in [0, length), [size]: they fall towards its ends, but not towards those of the whole.

    Near an end a network sees padding in place of the neighbours. There the weights are almost 0.
    """
    place = torch.arange(start, start + size, dtype=torch.float32, device=like.device)
    before = place - start + 1 if start > 0 else torch.full_like(place, size)
    after = start + size - place if start + size < length else torch.full_like(place, size)
    return (torch.minimum(before, after) / size - _PADDED_SHARE).clamp(min=1e-3)


def in_parts(
    function: Callable[[Tensor], Tensor], x: Tensor, window: int | None, in_scale: int, out_scale: int
) -> Tensor:
    """`function` of a picture or its latents, in windows that overlap by a quarter if they are given; see `tiled`."""
    if window is None:
        return function(x)
    return tiled(function, x, window, window // 4, in_scale, out_scale)
