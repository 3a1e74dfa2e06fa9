"""The random permutations of the published metrics: those of numpy's `RandomState`, so that numbers agree with them."""

from __future__ import annotations

import torch
from torch import Tensor

PUBLISHED_SEED = 2020
"""Seed of torch-fidelity."""


class Permutations:
    """The permutations that `numpy.random.RandomState(seed).permutation` gives one after the other.

    Both take the words of the Mersenne twister MT19937 (Matsumoto & Nishimura 1998, doi:10.1145/272991.272995), which
    torch seeds in the same way on the CPU. Position i, from the last one down, is exchanged with a uniform one of
    0 … i: the first word whose low bits are at most i.
    """

    def __init__(self, seed: int = PUBLISHED_SEED) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._words: list[int] = []

    def next(self, length: int) -> Tensor:
        """int64 [length], for a length below 2³¹."""
        order = list(range(length))
        for last in range(length - 1, 0, -1):
            mask = (1 << last.bit_length()) - 1
            while (other := self._word() & mask) > last:
                pass
            order[last], order[other] = order[other], order[last]
        return torch.tensor(order)

    def _word(self) -> int:
        """The low 31 bits of the next word."""
        if not self._words:
            words = torch.empty(4096, dtype=torch.int32).random_(generator=self._generator)
            self._words = words.flip(0).tolist()
        return self._words.pop()
