"""Pseudo-random permutations of which any place is found by itself, in constant time and memory.

A generalized Feistel network permutes the pairs (left, right) of [0, a) × [0, b), where a·b is the least such product
that is not below n; places that it sends beyond n walk on until they are below it. Source: Black and Rogaway 2002,
"Ciphers with arbitrary finite domains", doi:10.1007/3-540-45760-7_9. Rounds fold 64-bit products, keyed
by SHA-256.
"""

from __future__ import annotations

import hashlib
import math
from typing import TypeVar

import torch
from torch import Tensor

_NUM_ROUNDS = 6
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_MAX_SIZE = 2**62

Number = TypeVar("Number", int, Tensor)


class Permutation:
    """A permutation of [0, n).

    Args:
        name: of the permutation; every name has one of its own.
        size: how many numbers it permutes (n), at least 1.
    """

    def __init__(self, name: str, size: int) -> None:
        if not 0 < size <= _MAX_SIZE:
            raise ValueError(f"Permutation: size={size} is not in (0, 2**62]")
        digest = hashlib.sha256(name.encode()).digest()
        self._keys = [int.from_bytes(digest[4 * i : 4 * i + 4], "little") for i in range(_NUM_ROUNDS)]
        self._size = size
        self._left = math.isqrt(size - 1) + 1
        self._right = -(-size // self._left)

    def __call__(self, place: int) -> int:
        """The number at a place; both in [0, n)."""
        if not 0 <= place < self._size:
            raise ValueError(f"Permutation: place={place} is not in [0, {self._size})")
        while (place := self._once(place)) >= self._size:
            pass
        return place

    def at(self, places: Tensor) -> Tensor:
        """The numbers at these places, int64 of any shape in [0, n), without a check of the range."""
        found = self._once(places)
        while bool((beyond := found >= self._size).any()):
            found = torch.where(beyond, self._once(found), found)
        return found

    def _once(self, place: Number) -> Number:
        left, right = place // self._right, place % self._right
        for first, second in zip(self._keys[::2], self._keys[1::2], strict=True):
            left = (left + _mixed(right, first, self._left)) % self._left
            right = (right + _mixed(left, second, self._right)) % self._right
        return left * self._right + right


def _mixed(number: Number, key: int, bound: int) -> Number:
    """A hash of `number` < 2³², below `bound` ≤ 2³¹. Products of 32-bit numbers wrap in int64; their bits are right."""
    for multiplier in _MULTIPLIERS:
        product = (number ^ key) * multiplier
        number = ((product >> 32) ^ product) & _MASK
    return (number * bound) >> 32
