"""The order of samples as a function of seed, epoch and position: no state, nothing to restore.

An epoch permutes the shards, cuts them into windows of W shards and permutes the samples of each window. A permutation
is the order of counter-based random keys (Philox), so that finding a position takes only its own window. Consecutive
steps take consecutive positions of the endless stream of epochs; no sample is dropped at the end of an epoch.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ldm_cli import philox

_NUM_CACHED_WINDOWS = 4
_NUM_CACHED_EPOCHS = 2


def global_positions(step: int, batch_size: int, num_samples: int) -> tuple[Tensor, Tensor]:
    """Epoch and position of the samples of a global batch.

    Args:
        step: number of the step, from 0.
        batch_size: samples per step over all ranks (B).
        num_samples: samples per epoch.

    Returns:
        (epoch int64 [B], position int64 [B]) of the stream positions step·B … step·B + B - 1.
    """
    if step < 0 or batch_size < 1 or num_samples < 1:
        raise ValueError(f"global_positions: step={step}, batch_size={batch_size}, num_samples={num_samples}")
    stream = torch.arange(batch_size) + step * batch_size
    return stream // num_samples, stream % num_samples


def rank_slice(batch_size: int, rank: int, world_size: int) -> slice:
    """The part of a global batch that belongs to `rank`: equal parts, in order.

    Raises:
        ValueError: `world_size` does not divide `batch_size`, or there is no such rank.
    """
    if not 0 <= rank < world_size or batch_size % world_size:
        raise ValueError(f"rank_slice: batch_size={batch_size}, rank={rank}, world_size={world_size}")
    part = batch_size // world_size
    return slice(rank * part, (rank + 1) * part)


class Order:
    """`order(seed, epoch, position)` over shards of given sizes. It keeps a few windows, only to save time.

    Args:
        seed: of the run.
        shard_sizes: samples per shard, some of which may be 0.
        window: shards per window (W).
        stream: number of the order among those of one run, which are independent.
    """

    def __init__(self, seed: int, shard_sizes: Sequence[int], window: int, stream: int = 0) -> None:
        if window < 1 or not any(shard_sizes):
            raise ValueError(f"Order: window={window}, {sum(shard_sizes)} samples in {len(shard_sizes)} shards")
        suffix = f"/{stream}" if stream else ""
        self._shard_key = philox.key(seed, "order/shards" + suffix)
        self._sample_key = philox.key(seed, "order/samples" + suffix)
        self._sizes = tuple(shard_sizes)
        self._starts = (0, *itertools.accumulate(self._sizes))
        self._window = window
        self._epoch = lru_cache(maxsize=_NUM_CACHED_EPOCHS)(self._make_epoch)
        self._permuted = lru_cache(maxsize=_NUM_CACHED_WINDOWS)(self._make_window)

    @property
    def num_samples(self) -> int:
        """Samples per epoch."""
        return self._starts[-1]

    def __call__(self, epoch: int, position: int) -> tuple[int, int]:
        """(shard, sample within the shard) at `position` of `epoch`."""
        if not 0 <= position < self.num_samples:
            raise ValueError(f"Order: position={position} is not in [0, {self.num_samples})")
        _, ends = self._epoch(epoch)
        window = bisect_right(ends, position)
        start = ends[window - 1] if window else 0
        return self.locate(self._permuted(epoch, window)[position - start])

    def locate(self, number: int) -> tuple[int, int]:
        """(shard, sample within the shard) of the sample with this number, counted over all shards in order."""
        shard = bisect_right(self._starts, number) - 1
        return shard, number - self._starts[shard]

    def _make_epoch(self, epoch: int) -> tuple[list[int], list[int]]:
        """The permuted shards of an epoch, and the position at which each window ends."""
        shards = permutation(self._shard_key, epoch, torch.arange(len(self._sizes))).tolist()
        sizes = [
            sum(self._sizes[shard] for shard in shards[first : first + self._window])
            for first in range(0, len(shards), self._window)
        ]
        return shards, list(itertools.accumulate(sizes))

    def _make_window(self, epoch: int, window: int) -> list[int]:
        """Numbers of the samples of a window, in the order in which they are read."""
        shards = self._epoch(epoch)[0][window * self._window : (window + 1) * self._window]
        numbers = torch.cat([torch.arange(self._starts[s], self._starts[s + 1]) for s in shards])
        return permutation(self._sample_key, epoch, numbers).tolist()


def permutation(key: philox.Key, epoch: int, numbers: Tensor) -> Tensor:
    """`numbers` int64 [n], sorted by the 62-bit random keys of (epoch, number); ties keep their order."""
    words = philox.bits(key, torch.full_like(numbers, epoch), numbers, 2)
    return numbers[torch.argsort((words[:, 0] << 30) | (words[:, 1] >> 2), stable=True)]
