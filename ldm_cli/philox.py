"""Counter-based random numbers: Philox4x32-10 in torch integer arithmetic.

A number is a pure function of (seed, purpose, epoch, position, index): no state to save, no order to keep,
the same on every rank, worker, batch size and device. Source: Salmon, Moraes, Dror, Shaw 2011, "Parallel
random numbers: as easy as 1, 2, 3", doi:10.1145/2063384.2063405; constants and the known answers in the tests
are those of their Random123.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS = 10

Key = tuple[int, int] | tuple[Tensor, Tensor]
"""Two 32-bit integers; or int64 tensors [B, 1] of them, a key for each sample."""


def key(seed: int, purpose: str) -> tuple[int, int]:
    """The 2×32-bit key of one stream of numbers; different purposes under one seed are independent."""
    digest = hashlib.sha256(f"{purpose}\0{seed}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: Key) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32.

    Args:
        counter: four int64 tensors of one shape (or broadcastable), each value in [0, 2³²).
        key: its tensors, if any, broadcast with the counter.

    Returns:
        Four int64 tensors of that shape, values uniform in [0, 2³²).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_NUM_ROUNDS):
        # A 32×32-bit product wraps in int64, but its 64 bits are right; the shift's sign extension is masked
        # away.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = (product0 >> 32) & _MASK, (product1 >> 32) & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & _MASK, high0 ^ c3 ^ k1, product0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def bits(key: Key, epoch: Tensor, position: Tensor, count: int) -> Tensor:
    """`count` 32-bit words per sample.

    Args:
        epoch, position: int64 [B], not negative; epoch < 2³².
        count: words per sample.

    Returns:
        int64 [B, count] in [0, 2³²).
    """
    block = torch.arange(-(-count // 4), device=position.device)[None, :]
    p = position[:, None]
    words = philox4x32((block, p & _MASK, p >> 32, epoch[:, None]), key)
    return torch.stack(words, dim=-1).flatten(1)[:, :count]


def uniform(key: Key, epoch: Tensor, position: Tensor, count: int) -> Tensor:
    """float32 [B, count], uniform in (0, 1): 24 random bits, centred, so that neither end is reached."""
    return ((bits(key, epoch, position, count) >> 8).to(torch.float32) + 0.5) * 2.0**-24


def integers(key: Key, epoch: Tensor, position: Tensor, count: int, high: int) -> Tensor:
    """int64 [B, count], uniform in [0, high) up to a bias below high/2³² (Lemire's multiply-shift)."""
    if not 0 < high <= 2**31:
        raise ValueError(f"integers: high={high} is not in (0, 2**31]")
    return (bits(key, epoch, position, count) * high) >> 32


def normal(key: Key, epoch: Tensor, position: Tensor, shape: tuple[int, ...]) -> Tensor:
    """float32 [B, *shape], standard normal (Box and Muller 1958)."""
    count = math.prod(shape)
    num_pairs = -(-count // 2)
    u = uniform(key, epoch, position, 2 * num_pairs).view(len(position), num_pairs, 2)
    radius, angle = torch.sqrt(-2.0 * torch.log(u[..., 0])), (2.0 * math.pi) * u[..., 1]
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return pairs.flatten(1)[:, :count].reshape(-1, *shape)
