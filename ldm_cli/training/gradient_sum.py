"""Sums over the parts of a batch and over the ranks: gradients, running statistics, figures.

Addition of floats is not associative, so a sum depends on who adds what first. The plain sum adds a rank's parts in
turn and leaves the ranks to the all-reduce. The canonical one adds chunks of a fixed size as the leaves of one binary
tree over the whole batch, so that it does not depend on which rank computed a chunk, nor on how many there are: a rank
adds up the subtrees that lie within its own chunks, and every rank adds up what all of them found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ldm_cli.training.config import TrainConfig
from ldm_cli.training.distributed import Ranks


class Block(NamedTuple):
    """The chunks number·2^level … (number + 1)·2^level − 1: a subtree."""

    level: int
    number: int


def blocks(start: int, end: int) -> list[Block]:
    """The largest subtrees that the chunks start … end − 1 consist of, in order.

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
        """`value`, which is taken over and may be changed, is the sum of the chunks of `block`."""
        while block.number % 2 and self._waiting and self._waiting[-1][0] == (block.level, block.number - 1):
            _, left = self._waiting.pop()
            value = left.add_(value)
            block = Block(block.level + 1, block.number // 2)
        self._waiting.append((block, value))

    def subtrees(self) -> list[tuple[Block, Tensor]]:
        """What has been added up so far, in order."""
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


@dataclass(frozen=True)
class PartSum:
    """Adds one tensor per part of the batch, over the parts of this rank and over all ranks.

    Attributes:
        ranks: who computes the parts.
        parts_per_rank: how many this rank and every other computes; rank r has the parts r·n … (r + 1)·n − 1.
        is_canonical: whether the sum is to be the same bits for every number of ranks.
    """

    ranks: Ranks
    parts_per_rank: int
    is_canonical: bool

    @property
    def num_parts(self) -> int:
        """Parts of all ranks."""
        return self.parts_per_rank * self.ranks.world_size

    def __call__(self, parts: Iterator[Tensor]) -> Tensor:
        """The sum of all parts of all ranks, from this rank's parts, which are used up one by one.

        Raises:
            ValueError: these are not `parts_per_rank` parts.
        """
        if not self.is_canonical:
            total = self.within_rank(parts)
            self.ranks.sum_in_place([total])
            return total
        first = self.ranks.rank * self.parts_per_rank
        own = TreeSum()
        for number, part in enumerate(self._counted(parts), start=first):
            own.add(Block(0, number), part)
        return self._over_ranks(own)

    def within_rank(self, parts: Iterator[Tensor]) -> Tensor:
        """The plain sum of this rank's parts alone, for whoever adds up something else over the ranks besides.

        Raises:
            ValueError: these are not `parts_per_rank` parts.
        """
        counted = self._counted(parts)
        total = next(counted)
        for part in counted:
            total.add_(part)
        return total

    def _counted(self, parts: Iterator[Tensor]) -> Iterator[Tensor]:
        count = 0
        for part in parts:
            count += 1
            yield part
        if count != self.parts_per_rank:
            raise ValueError(f"PartSum: {count} parts where parts_per_rank={self.parts_per_rank}")

    def _over_ranks(self, own: TreeSum) -> Tensor:
        """Every rank gets the subtrees of all others and adds them up itself."""
        if self.ranks.world_size == 1:
            return own.total()
        mine = dict(own.subtrees())
        like = next(iter(mine.values()))
        tree = TreeSum()
        for rank in range(self.ranks.world_size):
            start = rank * self.parts_per_rank
            for block in blocks(start, start + self.parts_per_rank):
                value = mine[block] if rank == self.ranks.rank else like.new_empty(like.shape)
                self.ranks.copy_from(rank, value)
                tree.add(block, value)
        return tree.total()


def part_sum(config: TrainConfig, ranks: Ranks) -> PartSum:
    """The sum over the parts that the recipe asks for."""
    return PartSum(ranks, config.parts_per_rank(ranks.world_size), config.deterministic == "elastic")
