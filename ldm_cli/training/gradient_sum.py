"""Sums over the parts of a batch and over the ranks: gradients, running statistics, figures.

Addition of floats is not associative, so a sum depends on the order of its terms. The plain sum adds a rank's parts in
turn and leaves the ranks to all-reduces, which run while backward still computes other gradients. The canonical sum
treats the parts, which have a fixed size, as the leaves of one binary tree over the global batch. Its bits then depend
neither on which rank computed a part nor on the number of ranks: a rank adds up the subtrees within its own parts, and
every rank adds up the subtrees of all ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm_cli.training.config import TrainConfig
from ldm_cli.training.weights import Weights


class Block(NamedTuple):
    """A subtree: the parts number·2^level … (number + 1)·2^level − 1."""

    level: int
    number: int


def blocks(start: int, end: int) -> list[Block]:
    """The largest subtrees that the parts start … end − 1 consist of, in order.

    >>> blocks(1, 6)
    [Block(level=0, number=1), Block(level=1, number=1), Block(level=1, number=2)]
    """
    found = []
    while start < end:
        level = 0
        while start % 2 ** (level + 1) == 0 and start + 2 ** (level + 1) <= end:
            level += 1
        found.append(Block(level, start >> level))
        start += 1 << level
    return found


class TreeSum:
    """Adds subtrees that come in order: two siblings become their parent as soon as both are there."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Block, Tensor]] = []

    def add(self, block: Block, value: Tensor) -> None:
        """Add `value`, the sum of the parts of `block`. The tree keeps it and may change it in place."""
        while block.number % 2 and self._waiting and self._waiting[-1][0] == (block.level, block.number - 1):
            _, left = self._waiting.pop()
            value = left.add_(value)
            block = Block(block.level + 1, block.number // 2)
        self._waiting.append((block, value))

    def subtrees(self) -> list[tuple[Block, Tensor]]:
        """The sums so far, in the order of their parts."""
        return self._waiting

    def total(self) -> Tensor:
        """The sum; subtrees without a sibling are added from the smallest, which is last, to the largest.

        Raises:
            ValueError: nothing was added.
        """
        if not self._waiting:
            raise ValueError("TreeSum.total of 0 subtrees")
        *rest, (_, total) = self._waiting
        for _, value in reversed(rest):
            total = value + total
        return total


class PlainSum:
    """Adds up in the order of arrival: gradients in `.grad`, as autograd does, and over the ranks by all-reduces.

    Args:
        weights: the parameters, and the ranks.
        parts_per_rank: number of parts that each rank adds.
    """

    def __init__(self, weights: Weights, parts_per_rank: int) -> None:
        self._weights = weights
        self._weights.buckets.begin(parts_per_rank)
        self._values: Tensor | None = None

    def add(self, values: Tensor) -> None:
        """Add a part of the batch: the gradients that its backward pass left in `.grad`, and `values`, float32 [N]."""
        self._weights.buckets.end_pass()
        self._values = values if self._values is None else self._values + values

    def finish(self) -> Tensor:
        """Leave the gradients of all parts and ranks in `.grad`; the sum of their values is returned.

        Raises:
            ValueError: nothing was added.
        """
        if self._values is None:
            raise ValueError("PlainSum.finish after 0 parts")
        self._weights.buckets.finish()
        self._weights.take_local_gradients()
        self._weights.ranks.sum_in_place([self._values])
        return self._values


class CanonicalSum:
    """Adds up along one binary tree over the parts of all ranks: the same bits for any number of ranks.

    Args:
        weights: the parameters, replicated, and the ranks.
        parts_per_rank: how many parts each rank adds; rank r has the parts r·n … (r + 1)·n − 1.
    """

    def __init__(self, weights: Weights, parts_per_rank: int) -> None:
        self._ranks, self._parts_per_rank = weights.ranks, parts_per_rank
        self._parameters = weights.replicas()
        self._with_gradient: list[nn.Parameter] = []
        self._tree = TreeSum()
        self._count = 0

    def add(self, values: Tensor) -> None:
        """As `PlainSum.add`; `.grad` is emptied for the next part."""
        self._with_gradient = [p for p in self._parameters if p.grad is not None]
        gradients = [p.grad.reshape(-1) for p in self._with_gradient if p.grad is not None]
        for parameter in self._with_gradient:
            parameter.grad = None
        number = self._ranks.rank * self._parts_per_rank + self._count
        self._tree.add(Block(0, number), torch.cat([*gradients, values]))
        self._count += 1

    def finish(self) -> Tensor:
        """As `PlainSum.finish`.

        Raises:
            ValueError: a number of parts other than `parts_per_rank` was added.
        """
        if self._count != self._parts_per_rank:
            raise ValueError(f"CanonicalSum: {self._count} parts where parts_per_rank={self._parts_per_rank}")
        total = self._over_ranks()
        sizes = [parameter.numel() for parameter in self._with_gradient]
        *gradients, values = torch.split(total, [*sizes, len(total) - sum(sizes)])
        for parameter, gradient in zip(self._with_gradient, gradients, strict=True):
            # empty_like keeps the parameter's memory order, on which the fused kernel depends
            parameter.grad = torch.empty_like(parameter).copy_(gradient.view(parameter.shape))
        return values

    def _over_ranks(self) -> Tensor:
        """Every rank gets the subtrees of all others and adds them up itself."""
        if self._ranks.world_size == 1:
            return self._tree.total()
        own = dict(self._tree.subtrees())
        like = next(iter(own.values()))
        tree = TreeSum()
        for rank in range(self._ranks.world_size):
            start = rank * self._parts_per_rank
            for block in blocks(start, start + self._parts_per_rank):
                value = own[block] if rank == self._ranks.rank else torch.empty_like(like)
                self._ranks.copy_from(rank, value)
                tree.add(block, value)
        return tree.total()


def gradient_sum(weights: Weights, config: TrainConfig) -> PlainSum | CanonicalSum:
    """An empty sum of the kind that `train.deterministic` asks for."""
    kind = CanonicalSum if config.deterministic == "elastic" else PlainSum
    return kind(weights, config.parts_per_rank(weights.ranks.world_size))
