"""Statistics over all parts of a picture, of which a network sees one at a time.

A group norm (Wu & He 2018, arXiv:1803.08494) subtracts the mean of the whole map and divides by its deviation. Dynamic
thresholding divides by a percentile. A part has a mean, deviation and percentile of its own, so that two parts differ
where they meet. Here each part is computed twice: first to measure, then with the statistics of all parts. The first
time each part still has its own, on which later ones depend. The statistics of the second time are therefore close to
those of the whole picture, and the same for all parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ldm_cli.core.compiling import eagerly
from ldm_cli.core.diffusion.guidance import percentile

_Hook = Callable[[nn.GroupNorm, tuple[Tensor], Tensor], Tensor | None]


class SharedStatistics:
    """What the group norms of some networks, and thresholding, share between parts.

    Every part asks for the same statistics in the same order, as often as it likes.

    Args:
        networks: whose norms are shared.
    """

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        modules = (module for network in networks for module in network.modules())
        self._norms = [module for module in modules if isinstance(module, nn.GroupNorm)]
        self._totals: list[Tensor] = []
        """Sums over the parts, float64: of a norm Σ1, Σx and Σx², [3, B, groups]; of percentiles Σ1 and Σp, [2, B]."""
        self._num_asked = 0
        self._is_measuring = False

    def measured(self) -> AbstractContextManager[None]:
        """Within, a part is computed with its own statistics, which are added to those of the others."""
        return self._within(self._measure)

    def shared(self) -> AbstractContextManager[None]:
        """Within, a part is computed with the statistics of all that were measured."""
        return self._within(self._normed)

    def percentile(self, x0: Tensor, share: float) -> Tensor:
        """A percentile of the absolute values of a part's x_0, [B, …] → [B]; shared, the mean of those of all parts."""
        if self._is_measuring:
            own = percentile(x0, share)
            self._add(torch.stack([torch.ones_like(own), own]))
            return own
        count, total = self._next().unbind()
        return (total / count).float()

    @contextmanager
    def _within(self, hook: _Hook) -> Iterator[None]:
        self._num_asked, self._is_measuring = 0, hook == self._measure
        with ExitStack() as stack:
            stack.enter_context(eagerly())  # code that was compiled without hooks is run without them
            for norm in self._norms:
                stack.callback(norm.register_forward_hook(hook).remove)
            yield

    def _measure(self, norm: nn.GroupNorm, inputs: tuple[Tensor], output: Tensor) -> None:
        x = inputs[0]
        pixels = tuple(range(2, x.ndim))
        # float64, since a variance is the small difference of large numbers.
        total = x.sum(pixels, dtype=torch.float64)
        squares = torch.linalg.vector_norm(x, dim=pixels, dtype=torch.float64).square()
        sums = torch.stack([torch.full_like(total, x[0, 0].numel()), total, squares])
        self._add(sums.view(3, len(x), norm.num_groups, -1).sum(3))

    def _normed(self, norm: nn.GroupNorm, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """[B, C, …] of a part → the same, of mean 0 and deviation 1 over all parts, with the norm's gain and bias."""
        count, total, squares = self._next().unbind()
        mean = total / count
        inverse = ((squares / count - mean.square()).clamp(min=0) + norm.eps).rsqrt()  # Wu & He, eq. 2
        width = norm.num_channels // norm.num_groups
        gain = inverse.repeat_interleave(width, dim=1) * norm.weight
        bias = norm.bias - mean.repeat_interleave(width, dim=1) * gain
        shape = *gain.shape, *[1] * (output.ndim - 2)
        return torch.addcmul(bias.float().view(shape), inputs[0], gain.float().view(shape)).to(output.dtype)

    def _add(self, sums: Tensor) -> None:
        sums = sums.detach().double()
        if self._num_asked == len(self._totals):
            self._totals.append(sums)
        else:
            self._totals[self._num_asked] += sums
        self._num_asked += 1

    def _next(self) -> Tensor:
        self._num_asked += 1
        return self._totals[self._num_asked - 1]
