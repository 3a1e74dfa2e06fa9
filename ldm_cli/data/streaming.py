"""Samples from shards that are read once, in sequence and without an index: the output of commands, named pipes, data
sets that exceed the disk.

webdataset shuffles them through a buffer. The order of samples depends on the number of readers and on
the step at which a run was continued. Decoding, counts of bad samples and random numbers of a step are those of indexed
shards. A stream is damaged if the end of its tar is missing or its command failed.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import torch

from ldm_cli import philox
from ldm_cli.data.bad_samples import BadSample, BadSampleError
from ldm_cli.data.batch import Delivery, filled
from ldm_cli.data.config import DataConfig
from ldm_cli.data.order import rank_slice
from ldm_cli.data.patterns import PIPE, find_streams, shown_command
from ldm_cli.data.remote import without_credentials
from ldm_cli.data.sample_decoder import Draw, Members, MembersDecoder, Sample, Wanted
from ldm_cli.data.tar_index import split_name
from ldm_cli.data.tar_stream import members_of
from ldm_cli.errors import DataError, LdmError
from ldm_cli.reporting import Reporter

_MAX_BAD_TOGETHER = 64
_MAX_EMPTY_PASSES = 10  # of one reader: its own shards may be empty while others are not


@dataclass(frozen=True)
class Stream:
    """Shards that are read in sequence, in place of a `ShardSet`.

    Attributes:
        addresses: paths, `pipe:COMMAND`, or addresses that fsspec opens.
        num_samples, sha256: None, as they are unknown.
    """

    addresses: tuple[str, ...]
    num_samples: None = None
    sha256: None = None

    @property
    def fingerprint(self) -> str:
        """A constant: the content is unknown before it is read."""
        return "stream"

    def name(self, number: int) -> str:
        """Name of a shard in the names of samples."""
        address = self.addresses[number]
        if address.startswith(PIPE):
            return f"pipe-{number}"
        return Path(urlsplit(address).path if "://" in address else address).stem

    def shown(self, number: int) -> str:
        """Name of a shard in messages."""
        address = self.addresses[number]
        if address.startswith(PIPE):
            return f"pipe-{number} ({shown_command(address)})"
        return without_credentials(address) if "://" in address else address


def open_stream(config: DataConfig, reporter: Reporter) -> Stream:
    """The shards of a recipe with `stream: true`; nothing is read yet.

    Raises:
        InputNotFoundError: files are missing.
        UnavailableError: a remote source or a command is named, and not allowed.
    """
    stream = Stream(find_streams(config.shards, config.remote_schemes))
    reporter.warn(
        "data.stream: shards are read in sequence, so the samples of a step change with interruptions and with the "
        "number of workers and ranks"
    )
    return stream


@dataclass(frozen=True)
class RawSample:
    """A sample before it is decoded."""

    shard: int
    key: str
    members: dict[str, bytes]
    problem: str = ""


class StreamedSteps:
    """The delivery of each step; every reader has its own stream.

    Args:
        stream: from `open_stream`.
        wanted: the parts to read.
        batch_size: samples per step over all ranks.
        rank, world_size: of this process.
    """

    def __init__(
        self, stream: Stream, config: DataConfig, wanted: Wanted, seed: int, batch_size: int, rank: int, world_size: int
    ) -> None:
        self._stream, self._config, self._seed = stream, config, seed
        self._decoder = MembersDecoder(config, wanted)
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self._places = rank_slice(batch_size, rank, world_size)
        self._draw_key = philox.key(seed, "data/draw")
        self._samples: Generator[RawSample | BadSample] | None = None
        self._first, self._num_readers = 0, 1

    def begin(self, steps: range, num_workers: int) -> None:
        """Announce the next steps; worker n mod `num_workers`, its own process, makes the n-th of them."""
        self._first, self._num_readers = steps.start, min(num_workers, len(steps))

    def __call__(self, step: int) -> Delivery:
        """The part of `step`'s batch that belongs to this rank."""
        if self._samples is None:
            reader = self._rank * self._num_readers + (step - self._first) % self._num_readers
            self._samples = self._endless(reader, self._world_size * self._num_readers)
        position = step * self._batch_size + torch.arange(self._places.start, self._places.stop)
        epoch = torch.zeros_like(position)
        draws = philox.uniform(self._draw_key, epoch, position, 4).tolist()
        return filled(step, self._places, epoch, position, lambda number, bad: self._good_sample(draws[number], bad))

    def _good_sample(self, draw: list[float], bad: list[BadSample]) -> tuple[Sample, str]:
        """The next usable sample."""
        assert self._samples is not None
        while len(bad) <= _MAX_BAD_TOGETHER:
            raw = next(self._samples)
            found = (
                raw
                if isinstance(raw, BadSample)
                else decoded(self._stream, raw, self._decoder, Draw(draw[0], draw[1], draw[2], down=draw[3]))
            )
            if not isinstance(found, BadSample):
                return found
            bad.append(found)
        last = bad[-1]
        raise DataError(
            f"cannot use any of {len(bad)} samples, the last one '{last.key}' in '{last.shard}'",
            f"{last.reason} {last.detail}".strip(),
            "check the content of the streams",
        )

    def _endless(self, reader: int, num_readers: int) -> Generator[RawSample | BadSample]:
        """The samples of one reader, pass after pass: its own shards, or with too few shards every n-th sample of
        all."""
        from webdataset.filters import shuffle  # a slow import, needed for streams alone

        addresses, num_empty = range(len(self._stream.addresses)), 0
        for number in itertools.count():
            dice = random.Random(f"{self._seed}/{self._first}/{number}")  # the same for all readers
            order = dice.sample(addresses, len(addresses))
            whole = len(order) >= num_readers
            samples = read_stream(
                self._stream, self._config, self._decoder, order[reader::num_readers] if whole else order
            )
            if not whole:
                samples = itertools.islice(samples, reader, None, num_readers)
            num_empty += 1
            buffer = self._config.stream_buffer
            for sample in shuffle(buffer, initial=buffer, seed=dice.randrange(2**63) + reader)(samples):
                num_empty = 0
                yield sample
            if num_empty == _MAX_EMPTY_PASSES:
                raise DataError("there are no samples in the streams", f"first one: '{self._stream.shown(order[0])}'")


def decoded(stream: Stream, raw: RawSample, decoder: MembersDecoder, draw: Draw) -> tuple[Sample, str] | BadSample:
    """The sample and its name, or why it cannot be used."""
    try:
        if raw.problem:
            raise BadSampleError("duplicate members", raw.problem)
        sample = decoder.decode_members(Members(raw.members.get, raw.members), draw)
        return sample, f"{stream.name(raw.shard)}/{raw.key}"
    except BadSampleError as error:
        return BadSample(stream.shown(raw.shard), raw.key, error.reason, error.detail)


def read_stream(
    stream: Stream, config: DataConfig, decoder: MembersDecoder, numbers: Iterable[int]
) -> Iterator[RawSample | BadSample]:
    """The samples of these shards in sequence; members of one key must be adjacent. With `on_bad_shard: skip`, a bad
    sample without a key reports the damage of a shard.

    Raises:
        DataError, StorageError: a stream is damaged, or fails, and `on_bad_shard` is `stop`.
    """
    for number in numbers:
        try:
            yield from _samples(stream, number, config.max_member_bytes, decoder.extensions())
        except LdmError as error:
            if config.on_bad_shard == "stop":
                raise
            yield BadSample(stream.shown(number), "", "damaged shard", error.cause)


def _samples(stream: Stream, number: int, max_bytes: int, needed: set[str]) -> Iterator[RawSample]:
    """The samples of one shard; the last one only after the end of the shard was found."""
    current: RawSample | None = None
    for name, data in members_of(stream.addresses[number], stream.shown(number), max_bytes):
        found = split_name(name)
        if isinstance(found, str):  # no sample has it
            continue
        key, extension = found[0].decode("utf-8", "backslashreplace"), found[1]
        if current is None or key != current.key:
            if current is not None:
                yield current
            current = RawSample(number, key, {})
        current = _with_member(current, extension, data, needed)
    if current is not None:
        yield current


def _with_member(sample: RawSample, extension: str, data: bytes, needed: set[str]) -> RawSample:
    if extension in sample.members:
        return RawSample(sample.shard, sample.key, sample.members, f"2 × .{extension}")
    sample.members[extension] = data if extension in needed else b""
    return sample
