"""The shards of a data set: their indexes, and reading of single members."""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path

from ldm_cli.data.choice import Choice
from ldm_cli.data.fingerprint import fingerprint_of_contents
from ldm_cli.data.index_cache import forget_table, load_table, save_table, table_file
from ldm_cli.data.shard_facts import ShardFacts
from ldm_cli.data.shard_paths import ShardPaths
from ldm_cli.data.staging import StagingArea
from ldm_cli.data.tar_format import BLOCK, Member
from ldm_cli.data.tar_index import ShardIndex, index_tar
from ldm_cli.errors import DataError, StorageError

_MAX_OPEN_FILES = 64
_MAX_TABLES = 256
_LARGE_PIECE = 1 << 20  # for larger pieces, a second copy costs more than a second read


class ShardTables:
    """The indexes of a data set's shards. Each is mapped into memory when it is asked for, and made if there is none.

    Args:
        paths, facts: of the set.
        held: indexes that no file keeps.
        choice: the samples to use; None: all of them.
    """

    def __init__(
        self,
        paths: ShardPaths,
        facts: ShardFacts,
        held: Mapping[int, ShardIndex],
        staging: StagingArea | None = None,
        choice: Choice | None = None,
    ) -> None:
        self.held = held
        self._paths, self._facts, self._staging, self._choice = paths, facts, staging, choice
        self._known = lru_cache(maxsize=_MAX_TABLES)(self._index)

    def chosen(self, choice: Choice) -> ShardTables:
        """The same with the chosen samples alone."""
        return ShardTables(self._paths, self._facts, self.held, self._staging, choice)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, shard: int) -> ShardIndex:
        """The index of a shard.

        Raises:
            DataError: the shard is damaged, has changed, or holds another number of samples than was said before.
            StorageError: reading failed.
        """
        return self._known(shard)

    def __iter__(self) -> Iterator[ShardIndex]:
        return map(self.__getitem__, range(len(self)))

    def _index(self, shard: int) -> ShardIndex:
        table = self._table(shard)
        chosen = None if self._choice is None else self._choice.samples(shard)
        return table if chosen is None else replace(table, chosen=chosen)

    def _table(self, shard: int) -> ShardIndex:
        if shard in self.held:
            return self.held[shard]
        file, contents = table_file(self._paths.key(shard)), self._facts.contents_of(shard)
        index = load_table(file)
        if index is None or index.contents != contents:
            path = local_file(self._paths, self._facts, self._staging, shard)
            index = index_tar(path)
            if index.contents != contents:
                raise changed_shard(path, "other contents")
            with suppress(OSError):  # it is made again then, in every process
                save_table(file, index, self._facts.stamp_of(shard))
        if index.num_samples != self._facts.counts[shard]:
            cause = f"it holds {index.num_samples} samples, and a file beside it says {self._facts.counts[shard]}"
            remedy = "correct or delete that .idx, _stats.json or sizes.json, or run `ldm data index`"
            raise DataError(f"shard '{self._paths[shard]}' has another number of samples", cause, remedy)
        return index


@dataclass(frozen=True)
class ShardSet:
    """Shards in a fixed order. What is kept of each is a few numbers; the rest is read when it is asked for.

    Attributes:
        indexes: the samples and members of each shard; of the chosen samples alone, if there is a choice.
        sources: the shards of each given pattern.
        choice: the samples to use; None: all of them.
    """

    paths: ShardPaths
    facts: ShardFacts
    indexes: ShardTables
    sources: tuple[range, ...] = ()
    choice: Choice | None = None
    staging: StagingArea | None = field(default=None, compare=False, repr=False)

    def file(self, shard: int) -> Path:
        """The local file of a shard; errors as in `StagingArea.fetch`."""
        return local_file(self.paths, self.facts, self.staging, shard)

    @property
    def sizes(self) -> array[int]:
        """Samples per shard, good or not."""
        return self.facts.counts if self.choice is None else self.choice.counts

    @cached_property
    def num_samples(self) -> int:
        """Samples in all, good or not."""
        return sum(self.sizes)

    @property
    def ignored(self) -> dict[str, int]:
        """Members passed over, by reason."""
        return self.facts.ignored

    def fingerprint_of(self, shard: int) -> str:
        """What tells the chosen samples of a shard from others: hash of its sampled blocks, and of the choice."""
        digest = b"" if self.choice is None else self.choice.digest(shard)
        return self.facts.contents_of(shard) + digest.hex()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the shards' sampled blocks, counts and chosen samples, in order; the same wherever they lie."""
        digest = hashlib.sha256(self.facts.contents)
        digest.update(self.sizes)
        digest.update(b"" if self.choice is None else self.choice.digests)
        return digest.hexdigest()

    @cached_property
    def sha256(self) -> str | None:
        """SHA-256 of every byte of the shards, in their order; None unless all were hashed whole."""
        if not self.facts.hashes:
            return None
        hashes = (self.facts.sha256_of(shard) for shard in range(len(self.paths)))
        return hashlib.sha256("\n".join(hashes).encode()).hexdigest()

    def name(self, shard: int, sample: int) -> str:
        """Name of a sample in batches and reports: `shard/key`, the shard without its suffix."""
        return f"{self.paths[shard].stem}/{self.indexes[shard].key(sample)}"


def local_file(paths: ShardPaths, facts: ShardFacts, staging: StagingArea | None, shard: int) -> Path:
    """The local file of a shard, fetched if it is remote.

    Raises:
        DataError: it has changed at its server since it was indexed; other errors as in `StagingArea.fetch`.
    """
    address = paths.address(shard)
    if address is None or staging is None:
        return paths[shard]
    path = staging.fetch(address, facts.stamp_of(shard))
    if fingerprint_of_contents(path) != facts.contents_of(shard):
        raise changed_shard(path, "other contents")
    return path


def changed_shard(path: Path, cause: str) -> DataError:
    """The error for a shard that is no longer what was indexed."""
    remedy = "do not change shards while they are in use; run the same command again"
    return DataError(f"shard '{path}' has changed since it was indexed", cause, remedy)


class ShardReader:
    """Reads members of the shards of a set; safe for several threads, and after a fork."""

    def __init__(self, shards: ShardSet) -> None:
        self._shards = shards
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, shards: Collection[int]) -> None:
        """Close all other shards, so that remote ones may give way to new ones."""
        with self._lock:
            for shard in self._descriptors.keys() - set(shards):
                self._close(shard)

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
        forget_table(table_file(self._shards.paths.key(shard)))
        return changed_shard(self._shards.paths[shard], f"other content at byte {member.offset - BLOCK}")

    def close(self) -> None:
        """Close all files."""
        self.keep(())

    def __del__(self) -> None:
        self.close()

    def _descriptor(self, shard: int) -> int:
        if shard in self._descriptors:
            self._descriptors.move_to_end(shard)
        else:
            if len(self._descriptors) >= _MAX_OPEN_FILES:
                self._close(next(iter(self._descriptors)))
            path = self._shards.file(shard)
            self._descriptors[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._descriptors[shard]

    def _close(self, shard: int) -> None:
        os.close(self._descriptors.pop(shard))
        if self._shards.staging is not None:
            self._shards.staging.release(self._shards.paths[shard])
