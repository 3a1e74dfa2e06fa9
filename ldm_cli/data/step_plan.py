"""Which samples a step takes, and at which image shape, from shards, weights and aspect buckets.

A data set is divided into sources, which are mixed by weight, and into buckets of one shape; a step takes one bucket.
Each part has its own order, and interleavings choose the part. All of it is a function of seed and step, so that a run
can continue anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ldm_cli.data.buckets import Shape, shapes_of
from ldm_cli.data.choice import Choice
from ldm_cli.data.config import DataConfig
from ldm_cli.data.interleaving import Interleaving
from ldm_cli.data.order import Order
from ldm_cli.data.permutation import Permutation
from ldm_cli.data.shards import ShardSet
from ldm_cli.errors import InputNotFoundError

_BLOCK = 1024  # items interleaved at a time

Place = tuple[int, int]


@dataclass(frozen=True)
class _Part:
    """The samples of one source in one bucket.

    Attributes:
        order: of these samples, numbered within each shard from 0.
        first_shard: number of the source's first shard in the set.
        bucket: number of the bucket.
        choice: tells the samples of a bucket; None: all samples are in the only one.
    """

    order: Order
    first_shard: int
    bucket: int
    choice: Choice | None

    def at(self, number: int) -> Place:
        """Shard and sample at a place of the endless stream of epochs."""
        return self._place(*self.order(*divmod(number, self.order.num_samples)))

    def locate(self, number: int) -> Place:
        """Shard and sample of the part's sample with this number."""
        return self._place(*self.order.locate(number))

    def _place(self, shard: int, sample: int) -> Place:
        shard += self.first_shard
        return shard, sample if self.choice is None else self.choice.bucket(shard, self.bucket)[sample]

    def windows(self, number: int) -> tuple[list[int], list[int]]:
        """The shards of the window at a place of the endless stream of epochs, and those of the window after it."""
        epoch, position = divmod(number, self.order.num_samples)
        window = self.order.window(epoch, position)
        is_last = window.end == self.order.num_samples
        following = self.order.window(epoch + is_last, 0 if is_last else window.end)
        now, then = ([self.first_shard + shard for shard in one.shards] for one in (window, following))
        return now, then


@dataclass(frozen=True)
class _Bucket:
    """The samples that may share a batch."""

    shape: Shape
    parts: list[_Part]
    turns: Interleaving
    """Chooses the part of each sample."""

    def at(self, number: int) -> Turn:
        """The sample at a place of the endless stream of the bucket."""
        source, turn = self.turns(number)
        return Turn(self.parts[source].at(turn), self.parts[source], turn)


@dataclass(frozen=True)
class Turn:
    """A chosen sample, the part that it belongs to, and its place in the part's endless stream of epochs."""

    place: Place
    part: _Part
    number: int


class StepPlan:
    """The samples of every step.

    Args:
        shards: the data set; with a choice if there are buckets.
        batch_size: samples per step over all ranks (B).

    Raises:
        InputNotFoundError: a source that has a weight has no samples.
    """

    def __init__(self, seed: int, shards: ShardSet, config: DataConfig, batch_size: int) -> None:
        self._batch_size = batch_size
        self._replacements = f"data/replacement/{seed}"
        sources = shards.sources if config.weights else (range(len(shards.paths)),)
        weights = config.weights or (1.0,)
        counts = torch.frombuffer(shards.sizes, dtype=torch.int64)
        totals = [int(counts[source.start : source.stop].sum()) for source in sources]
        for source, total in zip(sources, totals, strict=True):
            if not total:
                first = f"'{shards.paths[source.start]}'" if source else "its files belong to an earlier one"
                raise InputNotFoundError("there are no samples in one of data.shards", f"first shard: {first}")
        shapes = shapes_of(config)
        choice = shards.choice if config.aspect_buckets else None
        by_bucket = counts[:, None]
        if choice is not None:
            by_bucket = torch.frombuffer(choice.bucket_counts, dtype=torch.int32).view(len(counts), -1)
        self._buckets: list[_Bucket] = []
        shares: list[float] = []
        for number, shape in enumerate(shapes):
            parts: list[_Part] = []
            rates: list[float] = []
            for source, total, weight in zip(sources, totals, weights, strict=True):
                sizes = by_bucket[source.start : source.stop, number].long()
                if bool(sizes.any()):
                    order = Order(seed, sizes, config.shuffle_window, number * len(sources) + len(parts))
                    parts.append(_Part(order, source.start, number, choice))
                    rates.append(weight * order.num_samples / total)
            if parts:
                self._buckets.append(_Bucket(shape, parts, Interleaving(f"sources/{seed}/{number}", rates, _BLOCK)))
                shares.append(sum(rates) if config.weights else sum(part.order.num_samples for part in parts))
        block = min(_BLOCK, max(1, shards.num_samples // batch_size))
        self._turns = Interleaving(f"buckets/{seed}", shares, block)

    def step(self, step: int, places: slice) -> tuple[Shape, list[Turn]]:
        """Height and width of a step's images, and the samples at these places of its batch."""
        number, batch = self._turns(step)
        bucket = self._buckets[number]
        first = batch * self._batch_size
        return bucket.shape, [bucket.at(first + place) for place in range(places.start, places.stop)]

    def replacements(self, turn: Turn, epoch: int, position: int, count: int) -> list[Place]:
        """Samples of the same source and shape to try in place of a bad one, in this order."""
        order = turn.part.order
        numbers = Permutation(f"{self._replacements}/{epoch}/{position}", order.num_samples)
        return [turn.part.locate(numbers(place)) for place in range(min(count, order.num_samples))]
