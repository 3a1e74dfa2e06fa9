"""Several streams interleaved by their shares: exact in the long run, and addressable at any place.

The interleaved stream is cut into blocks of about L items. Up to the end of block b, it has floor(b·L·share_i) items of
stream i, so that no remainder is lost. Within a block a permutation applies. The item at place t
is therefore a function of t, found with the items of its block.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import torch

from ldm_cli.data.permutation import Permutation

_NUM_CACHED_BLOCKS = 2


class Interleaving:
    """`interleaving(t)` is (stream, number within that stream).

    Args:
        name: of the random order within blocks.
        weights: of the streams, positive; their shares are in proportion.
        block: items per block (L).
    """

    def __init__(self, name: str, weights: Sequence[float], block: int) -> None:
        if not weights or min(weights) <= 0 or block < 1:
            raise ValueError(f"Interleaving: weights={weights}, block={block}")
        total = sum(map(Fraction, weights), Fraction())
        self._rates = [block * Fraction(weight) / total for weight in weights]
        self._name, self._block = name, block
        self._items = lru_cache(maxsize=_NUM_CACHED_BLOCKS)(self._make_items)

    def __call__(self, place: int) -> tuple[int, int]:
        """Stream, and number within it, at a place of the interleaved stream."""
        if len(self._rates) == 1:
            return 0, place
        block = place // self._block
        while self._start(block + 1) <= place:
            block += 1
        return self._items(block)[place - self._start(block)]

    def _given(self, block: int) -> list[int]:
        """Items of each stream before a block."""
        return [int(block * rate) for rate in self._rates]

    def _start(self, block: int) -> int:
        return sum(self._given(block))

    def _make_items(self, block: int) -> list[tuple[int, int]]:
        """The items of a block in their order."""
        before, after = self._given(block), self._given(block + 1)
        counts = [end - first for first, end in zip(before, after, strict=True)]
        streams = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        items = []
        order = Permutation(f"{self._name}/{block}", len(streams)).at(torch.arange(len(streams)))
        for stream in streams[order].tolist():
            items.append((stream, before[stream]))
            before[stream] += 1
        return items
