"""The order of samples as a function of seed, epoch and position: no state, nothing to restore.

The seed deals the shards into groups of 64 windows of W shards. An epoch permutes the groups, the shards of each group,
and the samples of each window. A place of these permutations is computed by itself (`permutation.py`), so that finding
a position takes a table of the groups' sizes and one of its own group's shards. Consecutive steps take consecutive
positions of the endless stream of epochs; no sample is dropped at the end of an epoch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ldm_cli.data.permutation import Permutation

ORDER = "grouped windows"
"""Name of this order in the facts of a run: a run goes on in the order that it began with."""

_WINDOWS_PER_GROUP = 64
_NUM_CACHED = 8


def global_positions(step: int, batch_size: int, num_samples: int) -> tuple[Tensor, Tensor]:
    """Epoch and position of the samples of a global batch.

    Args:
        step: number of the step, from 0.
        batch_size: samples per step over all ranks (B).

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


@dataclass(frozen=True)
class Window:
    """The samples that are shuffled together.

    Attributes:
        first, end: its positions in the epoch are first … end - 1.
        shards: in the order of the epoch.
        ends: how many samples the first 1, 2, … of them have.
        permutation: of its samples.
    """

    first: int
    end: int
    shards: list[int]
    ends: list[int]
    permutation: Permutation


class Order:
    """`order(seed, epoch, position)` over shards of given sizes. It keeps a few windows, only to save time.

    Args:
        shard_sizes: samples per shard, some of which may be 0.
        window: shards per window (W).
        stream: number of the order among those of one run, which are independent.

    Attributes:
        num_samples: samples per epoch.
    """

    def __init__(self, seed: int, shard_sizes: Sequence[int] | Tensor, window: int, stream: int = 0) -> None:
        self._sizes = torch.as_tensor(shard_sizes, dtype=torch.int64)
        self._ends = self._sizes.cumsum(0)
        self.num_samples = int(self._ends[-1]) if len(self._ends) else 0
        if window < 1 or not self.num_samples:
            raise ValueError(f"Order: window={window}, {self.num_samples} samples in {len(self._sizes)} shards")
        self._name = f"{ORDER}/{seed}/{stream}"
        self._window = window
        self._dealt = Permutation(f"{self._name}/deal", len(self._sizes))
        self._groups = torch.split(torch.arange(len(self._sizes)), window * _WINDOWS_PER_GROUP)
        self._group_sizes = torch.stack([self._sizes[self._dealt.at(places)].sum() for places in self._groups])
        self._epoch = lru_cache(maxsize=_NUM_CACHED)(self._make_epoch)
        self._group = lru_cache(maxsize=_NUM_CACHED)(self._make_group)
        self._window_of = lru_cache(maxsize=_NUM_CACHED)(self._make_window)

    def __call__(self, epoch: int, position: int) -> tuple[int, int]:
        """(shard, sample within the shard) at `position` of `epoch`."""
        window = self.window(epoch, position)
        number = window.permutation(position - window.first)
        slot = bisect_right(window.ends, number)
        return window.shards[slot], number - (window.ends[slot - 1] if slot else 0)

    def window(self, epoch: int, position: int) -> Window:
        """The window that `position` of `epoch` is in."""
        if not 0 <= position < self.num_samples:
            raise ValueError(f"Order: position={position} is not in [0, {self.num_samples})")
        groups, ends = self._epoch(epoch)
        slot = bisect_right(ends, position)
        first = ends[slot - 1] if slot else 0
        shard = bisect_right(self._group(epoch, groups[slot])[1], position - first)
        return self._window_of(epoch, groups[slot], first, shard // self._window)

    def locate(self, number: int) -> tuple[int, int]:
        """(shard, sample within the shard) of the sample with this number, counted over all shards in order."""
        shard = int(torch.searchsorted(self._ends, number, right=True))
        return shard, number - int(self._ends[shard] - self._sizes[shard])

    def _make_epoch(self, epoch: int) -> tuple[list[int], list[int]]:
        """The groups in the order of an epoch, and the position at which each ends."""
        groups = Permutation(f"{self._name}/{epoch}/groups", len(self._groups)).at(torch.arange(len(self._groups)))
        return groups.tolist(), self._group_sizes[groups].cumsum(0).tolist()

    def _make_group(self, epoch: int, group: int) -> tuple[list[int], list[int]]:
        """The shards of a group in the order of an epoch, and the samples up to the end of each."""
        places = self._groups[group]
        permutation = Permutation(f"{self._name}/{epoch}/{group}/shards", len(places))
        shards = self._dealt.at(places[permutation.at(places - places[0])])
        return shards.tolist(), self._sizes[shards].cumsum(0).tolist()

    def _make_window(self, epoch: int, group: int, first: int, number: int) -> Window:
        """A window by its number in a group, which begins at the position `first`."""
        shards, ends = self._group(epoch, group)
        begin, stop = number * self._window, min((number + 1) * self._window, len(shards))
        before, last = ends[begin - 1] if begin else 0, ends[stop - 1]
        permutation = Permutation(f"{self._name}/{epoch}/{group}/{number}/samples", last - before)
        own = [end - before for end in ends[begin:stop]]
        return Window(first + before, first + last, shards[begin:stop], own, permutation)
