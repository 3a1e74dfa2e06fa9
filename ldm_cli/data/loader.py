"""Batches from shards. A batch depends on seed and step, never on workers, ranks or interruptions."""

from __future__ import annotations

import math
import sys
import threading
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace
from functools import partial

import torch

from ldm_cli import philox
from ldm_cli.data.bad_samples import BadSample, BadSampleAccount, BadSampleError, BadSampleLog
from ldm_cli.data.batch import Batch, Delivery, collate, filled
from ldm_cli.data.config import DataConfig
from ldm_cli.data.decode import load_codecs
from ldm_cli.data.latent_cache import CachedDecoder, LatentCache
from ldm_cli.data.order import global_positions, rank_slice
from ldm_cli.data.prefetch import made_ahead
from ldm_cli.data.sample_decoder import Draw, MembersDecoder, Sample, SampleDecoder, Wanted
from ldm_cli.data.shards import ShardSet
from ldm_cli.data.shards_ahead import ShardsAhead
from ldm_cli.data.step_plan import Place, StepPlan
from ldm_cli.data.streaming import Stream, StreamedSteps, decoded, read_stream
from ldm_cli.errors import DataError

_MAX_REPLACEMENTS = 64

ReportBad = Callable[[BadSample], None]


class Loader:
    """The training batches of a data set.

    Args:
        shards: from `open_shards` or `open_stream`.
        config: how samples become tensors, and how many workers do it.
        seed: of the run; with (epoch, position) it decides order, crops, flips and caption choices.
        batch_size: samples per step over all ranks.
        rank, world_size: this process takes the `rank`-th of `world_size` equal parts of every batch.
        with_captions, with_images: whether to read and check these parts.
        report_bad: called with every bad sample, e.g. a `BadSampleLog`.
        cache: supplies encodings in place of images; only for indexed shards.

    Attributes:
        account: bad samples met so far.
        remarks: counts of captions cut or read as Windows-1252, of pictures converted to sRGB, …

    Raises:
        ValueError: `world_size` does not divide `batch_size`.
        InputNotFoundError: a source that has a weight has no samples.
    """

    def __init__(
        self,
        shards: ShardSet | Stream,
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
        self._interruption = threading.Event()
        self._places = rank_slice(batch_size, rank, world_size)
        wanted = Wanted(image=with_images, caption=with_captions)
        self._is_cached = cache is not None  # nothing is decoded then, and one thread is fast enough
        self._steps: _Steps | StreamedSteps
        if isinstance(shards, Stream):
            self._steps = StreamedSteps(shards, config, wanted, seed, batch_size, rank, world_size)
        else:
            decoder = cache.decoder(config, wanted) if cache else SampleDecoder(shards, config, wanted)
            self._steps = _Steps(shards, config, decoder, seed, batch_size, rank, world_size)

    def interrupt(self) -> None:
        """Let a thread that waits in `batches` raise an error soon, if it waits for a worker."""
        self._interruption.set()

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
        self._interruption.clear()
        if isinstance(self._log, BadSampleLog):
            num_good = start_step * (self._places.stop - self._places.start)
            self.account.restore(num_good, self._log.reasons_before(start_step, self._places))
        num_workers = 0 if self._is_cached else self._config.num_workers
        if is_streamed := isinstance(self._steps, StreamedSteps):
            num_workers = max(1, num_workers)  # unlike a thread, a process that waits for a stream can be killed
            self._steps.begin(steps, num_workers)
        if num_workers:
            load_codecs()
        made = made_ahead(
            self._steps,
            steps,
            num_workers=num_workers,
            timeout=self._config.worker_timeout,
            with_children=is_streamed,
            interruption=self._interruption,
        )
        with closing(made) as deliveries:
            for delivery in deliveries:
                yield _accept(delivery, self.account, self.remarks)


def sequential_batches(
    shards: ShardSet | Stream,
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
        shards: from `open_shards` or `open_stream`.
        batch_size: samples per batch; the last one may be smaller.
        limit: stop after this many good samples.
        with_captions, with_images: whether to read and check these parts.
        report_bad: called with every bad sample.

    Raises:
        DataError: too many samples are bad, or a shard has changed.
        StorageError: reading failed.
    """
    if batch_size < 1:
        raise ValueError(f"sequential_batches: batch_size={batch_size}")
    account, remarks = BadSampleAccount(config.max_bad_fraction, report_bad), Counter[str]()
    wanted = Wanted(image=with_images, caption=with_captions, metadata=with_json)
    in_order = _in_order(shards, config, wanted, batch_size, limit)
    is_streamed = isinstance(shards, Stream)
    made = made_ahead(
        lambda number: next(in_order, None),
        range(sys.maxsize),
        num_workers=int(is_streamed),
        timeout=config.worker_timeout,
        with_children=is_streamed,
    )
    with closing(in_order), closing(made) as deliveries:
        for delivery in deliveries:
            if delivery is None:
                return
            batch = _accept(delivery, account, remarks)
            if len(batch):
                yield batch


class _Steps:
    """Makes the delivery of each step; runs in the workers."""

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
        self._plan = StepPlan(seed, shards, config, batch_size)
        self._draw_key = philox.key(seed, "data/draw")
        self._decoder = decoder
        self._ahead = ShardsAhead(shards, decoder.keep)
        self._loss_weights: dict[int, float] | None = None
        if config.loss_weights is not None:
            weighted = zip(shards.sources, config.loss_weights, strict=True)
            self._loss_weights = {shard: weight for source, weight in weighted for shard in source}

    def __call__(self, step: int) -> Delivery:
        """The part of `step`'s batch that belongs to this rank."""
        epoch, position = global_positions(step, self._batch_size, self._shards.num_samples)
        epoch, position = epoch[self._places], position[self._places]
        draws = philox.uniform(self._draw_key, epoch, position, 4).tolist()
        shape, turns = self._plan.step(step, self._places)
        self._ahead.look(turns)

        def find(number: int, bad: list[BadSample]) -> tuple[Sample, str]:
            turn, draw = turns[number], draws[number]
            replacements = partial(self._plan.replacements, turn, int(epoch[number]), int(position[number]))
            return self._good_sample(turn.place, replacements, Draw(draw[0], draw[1], draw[2], shape, draw[3]), bad)

        return filled(step, self._places, epoch, position, find)

    def _good_sample(
        self, place: Place, replacements: Callable[[int], list[Place]], draw: Draw, bad: list[BadSample]
    ) -> tuple[Sample, str]:
        """The sample at a place, or the first good one of its replacements if it is bad."""
        tried = {place: None}
        for attempt in range(_MAX_REPLACEMENTS + 1):
            try:
                sample, name = self._decoder.decode(*place, draw), self._shards.name(*place)
                weight = None if self._loss_weights is None else self._loss_weights[place[0]]
                return replace(sample, loss_weight=weight), name
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
    shards: ShardSet | Stream, config: DataConfig, wanted: Wanted, batch_size: int, limit: int | None
) -> Generator[Delivery]:
    """Deliveries of `sequential_batches`."""
    remaining: float = math.inf if limit is None else limit
    position = 0
    with closing(_one_by_one(shards, config, wanted)) as found:
        while remaining:
            samples: list[Sample] = []
            keys: list[str] = []
            bad: list[BadSample] = []
            remarks: Counter[str] = Counter()
            while len(samples) < min(batch_size, remaining) and (one := next(found, None)):
                if isinstance(one, BadSample):
                    bad.append(one)
                    continue
                samples.append(one[0])
                keys.append(one[1])
                remarks.update(one[0].remarks)
            counter = torch.arange(position, position + len(samples))
            yield Delivery(collate(samples, keys, torch.zeros_like(counter), counter), bad, remarks)
            position += len(samples)
            remaining = remaining - len(samples) if len(samples) == batch_size else 0


def _one_by_one(
    shards: ShardSet | Stream, config: DataConfig, wanted: Wanted
) -> Generator[tuple[Sample, str] | BadSample]:
    """Every sample with its name, or why it is bad."""
    if isinstance(shards, Stream):
        from_members = MembersDecoder(config, wanted)
        for raw in read_stream(shards, config, from_members, range(len(shards.addresses))):
            yield raw if isinstance(raw, BadSample) else decoded(shards, raw, from_members, Draw())
        return
    with closing(SampleDecoder(shards, config, wanted)) as decoder:
        for shard, size in enumerate(shards.sizes):
            for number in range(size):
                try:
                    yield decoder.decode(shard, number, Draw()), shards.name(shard, number)
                except BadSampleError as error:
                    yield _bad_sample(shards, shard, number, error)


def _accept(delivery: Delivery, account: BadSampleAccount, remarks: Counter[str]) -> Batch:
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
