"""Batches out of shards: for a seed and a step always the same, whatever the workers, ranks and resumes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldm_cli import philox
from ldm_cli.data.bad_samples import BadSample, BadSampleAccount, BadSampleError, BadSampleLog
from ldm_cli.data.config import DataConfig
from ldm_cli.data.latent_cache import CachedDecoder, LatentCache
from ldm_cli.data.order import global_positions, rank_slice
from ldm_cli.data.plan import Place, Plan
from ldm_cli.data.prefetch import prefetched
from ldm_cli.data.sample import Draw, Encoding, Sample, SampleDecoder, Wanted
from ldm_cli.data.shards import ShardSet
from ldm_cli.data.workers import made_by_workers
from ldm_cli.errors import DataError, LdmError, printable

_NUM_AHEAD = 2
_MAX_REPLACEMENTS = 64

ReportBad = Callable[[BadSample], None]


@dataclass(frozen=True)
class Batch:
    """Samples of one step (B of them).

    Attributes:
        images: uint8 [B, 3, H, W], H = W = S without aspect buckets; B × 0 × 0 × 0 if no images were asked for.
        captions: B texts, empty if no captions were asked for.
        labels: class indexes int64 [B], if the recipe says where they are.
        keys: B names `shard/key`.
        epoch: int64 [B].
        position: int64 [B], within the epoch; with `epoch` the counter of all random numbers of a sample.
        metadata: B parsed JSON members, if asked for; {} where a sample has none.
        encoding: what the frozen encoders make of them, if it comes out of a cache; there are no images then.
    """

    images: Tensor
    captions: list[str]
    labels: Tensor | None
    keys: list[str]
    epoch: Tensor
    position: Tensor
    metadata: list[dict[str, Any]] | None = None
    encoding: Encoding | None = None

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.keys)

    def trace(self, step: int) -> Iterator[str]:
        """A line `step shard key` for each sample, by which two runs are compared."""
        for name in self.keys:
            shard, _, key = name.partition("/")
            yield f"{step} {printable(shard)} {printable(key)}"


@dataclass(frozen=True)
class _Delivery:
    """A batch on its way, with what has to be told about it; or the error that prevented it."""

    batch: Batch | None
    bad: list[BadSample]
    remarks: Counter[str]
    error: tuple[type[LdmError], str, str, str] | None = None


class Loader:
    """The training batches of a data set.

    Args:
        shards: what `open_shards` gave.
        config: how samples become tensors, and how many workers do it.
        seed: of the run; with (epoch, position) it decides order, crops, flips and caption choices.
        batch_size: samples per step over all ranks.
        rank, world_size: this process takes the `rank`-th of `world_size` equal parts of every batch.
        with_captions, with_images: parts not wanted are neither read nor checked.
        report_bad: called with every bad sample, e.g. a `BadSampleLog`.
        cache: gives encodings in place of images.

    Attributes:
        account: bad samples met so far.
        remarks: how many captions were read as Latin-1, cut, cleaned, …

    Raises:
        ValueError: `world_size` does not divide `batch_size`.
        RecipeError: there are both a cache and aspect buckets.
        InputNotFoundError: a source that has a weight has no samples.
    """

    def __init__(
        self,
        shards: ShardSet,
        config: DataConfig,
        *,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        with_captions: bool = True,
        with_images: bool = True,
        report_bad: ReportBad | None = None,
        cache: LatentCache | None = None,
    ) -> None:
        self.account = BadSampleAccount(config.max_bad_fraction, report_bad)
        self.remarks: Counter[str] = Counter()
        self.num_samples = shards.num_samples
        self._config, self._log = config, report_bad
        self._places = rank_slice(batch_size, rank, world_size)
        wanted = Wanted(image=with_images, caption=with_captions)
        self._is_cached = cache is not None  # nothing is decoded then: a thread is ahead of any trainer
        decoder = cache.decoder(config, wanted) if cache else SampleDecoder(shards, config, wanted)
        self._steps = _Steps(shards, config, decoder, seed, batch_size, rank, world_size)

    def batches(self, start_step: int, end_step: int) -> Generator[Batch]:
        """The batches of the steps start_step … end_step - 1; close the generator to stop early.

        Raises:
            DataError: too many samples are bad, or a shard has changed.
            StorageError: reading failed.
            WorkerError: a worker process died or hangs.
        """
        steps = range(start_step, end_step)
        if not steps:
            return
        if isinstance(self._log, BadSampleLog):
            num_good = start_step * (self._places.stop - self._places.start)
            self.account.restore(num_good, self._log.reasons_before(start_step, self._places))
        source: AbstractContextManager[Iterator[_Delivery]]
        if self._config.num_workers and not self._is_cached:
            source = closing(
                made_by_workers(
                    self._steps,
                    steps,
                    num_workers=self._config.num_workers,
                    num_ahead=_NUM_AHEAD,
                    timeout=self._config.worker_timeout,
                )
            )
        else:
            source = prefetched((self._steps(step) for step in steps), _NUM_AHEAD)
        with source as deliveries:
            for delivery in deliveries:
                yield _accept(delivery, self.account, self.remarks)


def sequential_batches(
    shards: ShardSet,
    config: DataConfig,
    batch_size: int,
    limit: int | None = None,
    with_json: bool = False,
    *,
    with_captions: bool = True,
    with_images: bool = True,
    report_bad: ReportBad | None = None,
) -> Generator[Batch]:
    """Every good sample once, in the order of the shards: central crop (or squash), no flips, the first of
    several captions.

    Args:
        shards: what `open_shards` gave.
        config: how samples become tensors.
        batch_size: samples per batch; the last one may be smaller.
        limit: stop after this many good samples.
        with_json: also parse the JSON members.
        with_captions, with_images: parts not wanted are neither read nor checked.
        report_bad: called with every bad sample.

    Raises:
        DataError: too many samples are bad, or a shard has changed.
        StorageError: reading failed.
    """
    if batch_size < 1:
        raise ValueError(f"sequential_batches: batch_size={batch_size}")
    account, remarks = BadSampleAccount(config.max_bad_fraction, report_bad), Counter[str]()
    wanted = Wanted(image=with_images, caption=with_captions, metadata=with_json)
    with prefetched(_in_order(shards, config, wanted, batch_size, limit), _NUM_AHEAD) as deliveries:
        for delivery in deliveries:
            batch = _accept(delivery, account, remarks)
            if len(batch):
                yield batch


class _Steps:
    """The delivery of each step; what the workers run."""

    def __init__(
        self,
        shards: ShardSet,
        config: DataConfig,
        decoder: SampleDecoder | CachedDecoder,
        seed: int,
        batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        self._shards, self._batch_size = shards, batch_size
        self._places = rank_slice(batch_size, rank, world_size)
        self._plan = Plan(seed, shards, config, batch_size)
        self._draw_key = philox.key(seed, "data/draw")
        self._decoder = decoder

    def __call__(self, step: int) -> _Delivery:
        """The part of `step`'s batch that belongs to this rank."""
        epoch, position = global_positions(step, self._batch_size, self._shards.num_samples)
        epoch, position = epoch[self._places], position[self._places]
        draws = philox.uniform(self._draw_key, epoch, position, 3).tolist()
        shape, turns = self._plan.step(step, self._places)
        samples: list[Sample] = []
        keys: list[str] = []
        bad: list[BadSample] = []
        remarks: Counter[str] = Counter()
        try:
            for number, (turn, draw) in enumerate(zip(turns, draws, strict=True)):
                found: list[BadSample] = []
                drawn = Draw(draw[0], draw[1], draw[2], shape)
                replacements = partial(self._plan.replacements, turn, int(epoch[number]), int(position[number]))
                try:
                    sample, key = self._good_sample(turn.place, replacements, drawn, found)
                finally:
                    bad += [replace(one, step=step, place=self._places.start + number) for one in found]
                samples.append(sample)
                keys.append(key)
                remarks.update(sample.remarks)
        except LdmError as error:
            return _Delivery(None, bad, remarks, (type(error), error.what, error.cause, error.remedy))
        return _Delivery(_collate(samples, keys, epoch, position), bad, remarks)

    def _good_sample(
        self, place: Place, replacements: Callable[[int], list[Place]], draw: Draw, bad: list[BadSample]
    ) -> tuple[Sample, str]:
        """The sample at a place; in place of a bad one, the first good one of its replacements."""
        tried = {place: None}
        for attempt in range(_MAX_REPLACEMENTS + 1):
            try:
                return self._decoder.decode(*place, draw), self._shards.name(*place)
            except BadSampleError as error:
                bad.append(_bad_sample(self._shards, *place, error))
            if attempt == 0:
                tried |= dict.fromkeys(replacements(_MAX_REPLACEMENTS))
            if attempt + 1 == len(tried):
                break
            place = list(tried)[attempt + 1]
        last = bad[-1]
        raise DataError(
            f"cannot use any of {len(tried)} samples, the last one '{last.key}' in '{last.shard}'",
            f"{last.reason} {last.detail}".strip(),
            "run `ldm data check` on the shards",
        )


def _in_order(
    shards: ShardSet, config: DataConfig, wanted: Wanted, batch_size: int, limit: int | None
) -> Generator[_Delivery]:
    """Deliveries of `sequential_batches`."""
    decoder = SampleDecoder(shards, config, wanted)
    numbers = ((s, i) for s, size in enumerate(shards.sizes) for i in range(size))
    remaining = shards.num_samples if limit is None else limit
    position = 0
    while remaining:
        samples: list[Sample] = []
        keys: list[str] = []
        bad: list[BadSample] = []
        remarks: Counter[str] = Counter()
        while len(samples) < min(batch_size, remaining) and (place := next(numbers, None)):
            try:
                sample = decoder.decode(*place, Draw())
            except BadSampleError as error:
                bad.append(_bad_sample(shards, *place, error))
                continue
            samples.append(sample)
            keys.append(shards.name(*place))
            remarks.update(sample.remarks)
        counter = torch.arange(position, position + len(samples))
        yield _Delivery(_collate(samples, keys, torch.zeros_like(counter), counter), bad, remarks)
        position += len(samples)
        remaining = remaining - len(samples) if len(samples) == batch_size else 0
    decoder.close()


def _collate(samples: list[Sample], keys: list[str], epoch: Tensor, position: Tensor) -> Batch:
    images = [sample.image for sample in samples if sample.image is not None]
    labels = [sample.label for sample in samples if sample.label is not None]
    has_metadata = bool(samples) and samples[0].metadata is not None
    return Batch(
        images=torch.stack(images) if images else torch.empty(len(samples), 0, 0, 0, dtype=torch.uint8),
        captions=[sample.caption for sample in samples],
        labels=torch.tensor(labels, dtype=torch.int64) if labels else None,
        keys=keys,
        epoch=epoch,
        position=position,
        metadata=[sample.metadata or {} for sample in samples] if has_metadata else None,
        encoding=_stacked([sample.encoding for sample in samples if sample.encoding is not None]),
    )


def _stacked(encodings: list[Encoding]) -> Encoding | None:
    if not encodings:
        return None
    fields = zip(*((one.mean, one.logvar, one.states) for one in encodings), strict=True)
    return Encoding(*(torch.stack(tensors) for tensors in fields))


def _accept(delivery: _Delivery, account: BadSampleAccount, remarks: Counter[str]) -> Batch:
    """Account for a delivery and unpack it."""
    account.add(len(delivery.batch) if delivery.batch else 0, delivery.bad)
    remarks.update(delivery.remarks)
    if delivery.error is not None:
        kind, what, cause, remedy = delivery.error
        raise kind(what, cause, remedy)
    assert delivery.batch is not None
    return delivery.batch


def _bad_sample(shards: ShardSet, shard: int, number: int, error: BadSampleError) -> BadSample:
    return BadSample(str(shards.paths[shard]), shards.indexes[shard].key(number), error.reason, error.detail)
