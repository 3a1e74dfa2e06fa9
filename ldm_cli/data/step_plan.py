"""Which samples a step takes, and at which image shape, from shards, weights and aspect buckets.

A data set is divided into sources, which are mixed by weight, and into buckets of one shape; a step takes one bucket.
Each part has its own order, and interleavings choose the part. All of it is a function of seed and step, so that a run
can continue anywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_cli import philox
from ldm_cli.data.config import DataConfig
from ldm_cli.data.interleaving import Interleaving
from ldm_cli.data.order import Order
from ldm_cli.data.shards import ShardSet
from ldm_cli.errors import InputNotFoundError

_BLOCK = 4096  # items interleaved at a time

Place = tuple[int, int]
Shape = tuple[int, int]


@dataclass(frozen=True)
class _Part:
    """The samples of one source in one bucket.

    Attributes:
        order: of these samples, numbered within each shard from 0.
        first_shard: number of the source's first shard in the set.
        samples: for each shard of the source the samples of this part, int64; None: all of them.
    """

    order: Order
    first_shard: int
    samples: list[Tensor] | None

    def at(self, number: int) -> Place:
        """Shard and sample at a place of the endless stream of epochs."""
        return self._place(*self.order(*divmod(number, self.order.num_samples)))

    def locate(self, number: int) -> Place:
        """Shard and sample of the part's sample with this number."""
        return self._place(*self.order.locate(number))

    def _place(self, shard: int, sample: int) -> Place:
        return self.first_shard + shard, sample if self.samples is None else int(self.samples[shard][sample])


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
        return Turn(self.parts[source].at(turn), self.parts[source])


@dataclass(frozen=True)
class Turn:
    """A chosen sample, and the part it belongs to."""

    place: Place
    part: _Part


class StepPlan:
    """The samples of every step.

    Args:
        seed: of the run.
        shards: the data set; with `image_sizes` if there are buckets.
        config: weights, buckets, window.
        batch_size: samples per step over all ranks (B).

    Raises:
        InputNotFoundError: a source that has a weight has no samples.
    """

    def __init__(self, seed: int, shards: ShardSet, config: DataConfig, batch_size: int) -> None:
        self._batch_size = batch_size
        self._replacement_key = philox.key(seed, "data/replacement")
        sources = shards.sources if config.weights else (range(len(shards.paths)),)
        weights = config.weights or (1.0,)
        for source in sources:
            if not sum(shards.sizes[shard] for shard in source):
                first = f"'{shards.paths[source.start]}'" if source else "its files belong to an earlier one"
                raise InputNotFoundError("there are no samples in one of data.shards", f"first shard: {first}")
        shapes = [(config.image_size, config.image_size)]
        chosen: list[list[Tensor]] | None = None
        if config.aspect_buckets and shards.image_sizes is not None:
            shapes = bucket_shapes(config.image_size, config.aspect_buckets.step, config.aspect_buckets.max_aspect)
            chosen = _by_shape(shards.image_sizes, shapes)
        totals = [sum(shards.sizes[shard] for shard in source) for source in sources]
        self._buckets: list[_Bucket] = []
        shares: list[float] = []
        for number, shape in enumerate(shapes):
            parts: list[_Part] = []
            rates: list[float] = []
            for source, total, weight in zip(sources, totals, weights, strict=True):
                samples = [chosen[number][shard] for shard in source] if chosen else None
                sizes = [len(one) for one in samples] if samples else [shards.sizes[shard] for shard in source]
                if any(sizes):
                    order = Order(seed, sizes, config.shuffle_window, number * len(sources) + len(parts))
                    parts.append(_Part(order, source.start, samples))
                    rates.append(weight * sum(sizes) / total)
            if parts:
                key = philox.key(seed, f"plan/sources/{number}")
                self._buckets.append(_Bucket(shape, parts, Interleaving(key, rates, _BLOCK)))
                shares.append(sum(rates) if config.weights else sum(part.order.num_samples for part in parts))
        block = min(_BLOCK, max(1, shards.num_samples // batch_size))
        self._turns = Interleaving(philox.key(seed, "plan/buckets"), shares, block)

    def step(self, step: int, places: slice) -> tuple[Shape, list[Turn]]:
        """Height and width of a step's images, and the samples at these places of its batch."""
        number, batch = self._turns(step)
        bucket = self._buckets[number]
        first = batch * self._batch_size
        return bucket.shape, [bucket.at(first + place) for place in range(places.start, places.stop)]

    def replacements(self, turn: Turn, epoch: int, position: int, count: int) -> list[Place]:
        """Samples of the same source and shape to try in place of a bad one, in this order."""
        counter = torch.tensor([epoch]), torch.tensor([position])
        order = turn.part.order
        numbers = philox.integers(self._replacement_key, *counter, count, order.num_samples)[0].tolist()
        return [turn.part.locate(number) for number in numbers]


def bucket_shapes(image_size: int, step: int, max_aspect: float) -> list[Shape]:
    """Heights and widths in multiples of `step`, of at most `image_size`² pixels and nearly as many.

    Each width has the greatest height that fits, and the transposed shape (NovelAI, "Improvements on Stable Diffusion",
    2022: aspect ratio bucketing).
    """
    shapes: set[Shape] = set()
    for width in range(step, image_size + 1, step):
        height = image_size**2 // width // step * step
        if height and max(height, width) <= max_aspect * min(height, width):
            shapes |= {(height, width), (width, height)}
    return sorted(shapes) or [(image_size, image_size)]


def _by_shape(image_sizes: tuple[Tensor, ...], shapes: list[Shape]) -> list[list[Tensor]]:
    """For each shape and shard, the samples nearest to it in the logarithm of the aspect ratio."""
    targets = torch.tensor([math.log(width / height) for height, width in shapes], dtype=torch.float64)
    chosen: list[list[Tensor]] = [[] for _ in shapes]
    for sizes in image_sizes:
        known = sizes.double().clamp(min=1)
        nearest = (torch.log(known[:, 0] / known[:, 1])[:, None] - targets).abs().argmin(dim=1)
        for number, samples in enumerate(chosen):
            samples.append((nearest == number).nonzero().flatten())
    return chosen
