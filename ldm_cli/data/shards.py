"""The shards of a data set: their indexes, and reading of single members."""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from torch import Tensor

from ldm_cli.data.remote import StagingArea
from ldm_cli.data.tar_format import BLOCK, Member
from ldm_cli.data.tar_index import ShardIndex
from ldm_cli.errors import DataError, StorageError

_MAX_OPEN_FILES = 64
_LARGE_PIECE = 1 << 20  # for larger pieces, a second copy costs more than a second read


@dataclass(frozen=True)
class ShardSet:
    """Shards and their indexes, in a fixed order.

    Attributes:
        paths: the files.
        indexes: the samples and members of each shard.
        sources: the shards of each given pattern.
        image_sizes: for each shard int32 [N, 2], width and height of its samples' images; None unless needed.
        staging: keeps fetched shards from removal while the set exists.
    """

    paths: tuple[Path, ...]
    indexes: tuple[ShardIndex, ...]
    sources: tuple[range, ...] = ()
    image_sizes: tuple[Tensor, ...] | None = None
    staging: StagingArea | None = field(default=None, compare=False, repr=False)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Samples per shard."""
        return tuple(index.num_samples for index in self.indexes)

    @cached_property
    def num_samples(self) -> int:
        """Samples in all, good or not."""
        return sum(self.sizes)

    @cached_property
    def ignored(self) -> dict[str, int]:
        """Members passed over, by reason."""
        return dict(sorted(sum((Counter(index.ignored) for index in self.indexes), Counter()).items()))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the shards' indexes and sampled blocks, in their order; the same wherever the folder lies."""
        return _of_all([index.fingerprint() for index in self.indexes])

    @cached_property
    def sha256(self) -> str | None:
        """SHA-256 of every byte of the shards, in their order; None unless all were hashed whole."""
        hashes = [index.sha256 for index in self.indexes if index.sha256 is not None]
        return _of_all(hashes) if len(hashes) == len(self.indexes) else None

    def name(self, shard: int, sample: int) -> str:
        """Name of a sample in batches and reports: `shard/key`, the shard without its suffix."""
        return f"{self.paths[shard].stem}/{self.indexes[shard].key(sample)}"


def _of_all(hashes: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


class ShardReader:
    """Reads members of the shards of a set; safe for several threads, and after a fork."""

    def __init__(self, shards: ShardSet) -> None:
        self._shards = shards
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, shard: int, member: Member) -> bytes:
        """The data of a member.

        Raises:
            DataError: the shard is no longer what was indexed.
            StorageError: reading failed.
        """
        return self.read_all(shard, (member,))[0]

    def read_all(self, shard: int, members: Sequence[Member]) -> list[bytes]:
        """The data of one or more members, in one read if they lie close together; raises as `read`."""
        start, last = min(members).offset - BLOCK, max(members)
        size = last.offset + last.size - start
        if size > _LARGE_PIECE or size > 2 * sum([member.size + 2 * BLOCK for member in members]):
            return [self._read_alone(shard, member) for member in members]
        piece = self._bytes(shard, start, size)
        found = []
        for member in members:
            begin = member.offset - start
            data = piece[begin : begin + member.size]
            if zlib.crc32(piece[begin - BLOCK : begin]) != member.header_crc or len(data) != member.size:
                raise self._changed(shard, member)
            found.append(data)
        return found

    def _read_alone(self, shard: int, member: Member) -> bytes:
        """The data of a large or distant member: header and data in two reads, which saves a copy of the data."""
        header = self._bytes(shard, member.offset - BLOCK, BLOCK)
        data = self._bytes(shard, member.offset, member.size)
        if zlib.crc32(header) != member.header_crc or len(data) != member.size:
            raise self._changed(shard, member)
        return data

    def _bytes(self, shard: int, start: int, size: int) -> bytes:
        """A range of a shard's file; shorter at the end of the file."""
        with self._lock:
            try:
                return os.pread(self._descriptor(shard), size, start)
            except OSError as error:
                path = self._shards.paths[shard]
                raise StorageError(f"cannot read shard '{path}'", os.strerror(error.errno or 0)) from error

    def _changed(self, shard: int, member: Member) -> DataError:
        return DataError(
            f"shard '{self._shards.paths[shard]}' has changed since it was indexed",
            f"other content at byte {member.offset - BLOCK}",
            "do not change shards while they are in use; run the same command again",
        )

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def _descriptor(self, shard: int) -> int:
        if shard in self._descriptors:
            self._descriptors.move_to_end(shard)
        else:
            if len(self._descriptors) >= _MAX_OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[shard] = os.open(self._shards.paths[shard], os.O_RDONLY | os.O_CLOEXEC)
        return self._descriptors[shard]
