"""Group norms over all parts of a picture, of which a network sees one at a time.

A group norm (Wu & He 2018, arXiv:1803.08494) subtracts the mean of the whole map and divides by its deviation. A part
has a mean and deviation of its own, so that two parts differ where they meet. Here each part is computed twice: once to
sum up x and x², a second time with the mean and deviation of all parts. The first time each part still has its own, and
what follows a norm depends on it. The statistics of the second time are therefore close to those of the whole picture,
but the same for all parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ldm_cli.core.compiling import eagerly


class SharedNorms:
    """The statistics that the group norms of some networks share between parts.

    Each part calls the norms in the same order, as often as it likes.

    Args:
        networks: whose norms are shared.
    """

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        modules = (module for network in networks for module in network.modules())
        self._norms = [module for module in modules if isinstance(module, nn.GroupNorm)]
        self._moments: list[Tensor] = []  # of each call: Σ1, Σx and Σx² over pixels and channels, [3, B, groups]
        self._num_calls = 0

    def __bool__(self) -> bool:
        """Whether there are any norms."""
        return bool(self._norms)

    def measured(self) -> AbstractContextManager[None]:
        """Within, a part is computed whose statistics are added to those of the others."""
        return self._hooked(self._measure)

    def shared(self) -> AbstractContextManager[None]:
        """Within, a part is computed with the statistics of all that were measured."""
        return self._hooked(self._normed)

    @contextmanager
    def _hooked(self, hook: Callable[[nn.GroupNorm, tuple[Tensor], Tensor], Tensor | None]) -> Iterator[None]:
        self._num_calls = 0
        with ExitStack() as stack:
            stack.enter_context(eagerly())  # code that was compiled without hooks is run without them
            for norm in self._norms:
                stack.callback(norm.register_forward_hook(hook).remove)
            yield

    def _measure(self, norm: nn.GroupNorm, inputs: tuple[Tensor], output: Tensor) -> None:
        x = inputs[0].detach()
        pixels = tuple(range(2, x.ndim))
        total = x.sum(pixels, dtype=torch.float32)
        squares = torch.linalg.vector_norm(x, dim=pixels, dtype=torch.float32).square()
        count = torch.full_like(total, x[0, 0].numel())
        moments = torch.stack([count, total, squares]).double().unflatten(2, (norm.num_groups, -1)).sum(3)
        if self._num_calls == len(self._moments):
            self._moments.append(moments)
        else:
            self._moments[self._num_calls] += moments
        self._num_calls += 1

    def _normed(self, norm: nn.GroupNorm, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """[B, C, …] of a part → the same, of mean 0 and deviation 1 over all parts, with the norm's gain and bias."""
        count, total, squares = self._moments[self._num_calls]
        self._num_calls += 1
        mean = total / count
        inverse = (squares / count - mean.square() + norm.eps).rsqrt()  # Wu & He, eq. 2
        width = norm.num_channels // norm.num_groups
        gain = inverse.repeat_interleave(width, dim=1) * norm.weight
        bias = norm.bias - mean.repeat_interleave(width, dim=1) * gain
        shape = *gain.shape, *[1] * (output.ndim - 2)
        return torch.addcmul(bias.float().view(shape), inputs[0], gain.float().view(shape)).to(output.dtype)
