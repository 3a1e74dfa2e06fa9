"""The samples of a data set that a filter, a quarantine and aspect buckets leave.

The numbers of a shard's samples are in a file of their own, mapped into memory when a sample of the shard is asked for.
What is needed of all shards, how many samples are left in each bucket, is in one file for the whole set.
"""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from ldm_cli.data.columns import read_columns, write_columns
from ldm_cli.data.index_cache import cache_folder
from ldm_cli.data.tar_index import Column
from ldm_cli.errors import StorageError

_HASH = 16
_MAX_FILES = 256


@dataclass(frozen=True)
class ShardChoice:
    """The chosen samples of one shard.

    Attributes:
        kept: uint32 [n], their numbers, ascending; None: all.
        num_samples: how many those are.
        buckets: uint32 [n], places in `kept` by aspect bucket, ascending in each; empty without buckets.
        bucket_ends: uint32 [B], where each bucket ends in `buckets`.
    """

    kept: Column | None
    num_samples: int
    buckets: Column = field(default_factory=lambda: array("I"))
    bucket_ends: Column = field(default_factory=lambda: array("I"))

    def digest(self) -> bytes:
        """What tells these samples from others: 16 bytes, zeros for all of them."""
        return bytes(_HASH) if self.kept is None else hashlib.sha256(self.kept).digest()[:_HASH]

    def bucket(self, number: int) -> Column:
        """The places in `kept` of a bucket's samples."""
        return self.buckets[self.bucket_ends[number - 1] if number else 0 : self.bucket_ends[number]]

    def write(self, file: Path) -> None:
        """Keep these; errors as in `write_columns`."""
        columns = {"kept": self.kept or b"", "buckets": self.buckets, "bucket_ends": self.bucket_ends}
        write_columns(file, columns, {"is_whole": self.kept is None, "num_samples": self.num_samples})

    @classmethod
    def read(cls, file: Path) -> ShardChoice | None:
        """What `write` has kept; None if there is no such file, or a damaged one."""
        found = read_columns(file)
        if found is None:
            return None
        columns, facts = {name: column.cast("I") for name, column in found[0].items()}, found[1]
        kept = None if facts["is_whole"] else columns["kept"]
        return cls(kept, facts["num_samples"], columns["buckets"], columns["bucket_ends"])


class Choice:
    """The chosen samples of all shards (N of them, B buckets).

    Attributes:
        counts: int64 [N], chosen samples of each shard.
        bucket_counts: int32 [N · B], of these in each bucket; empty without buckets.
        digests: of the chosen samples, 16 bytes a shard; zeros where all are.
        names: of the files with the numbers, 16 bytes a shard; zeros where all samples are chosen.
        held: choices that no file keeps, by shard.
    """

    def __init__(
        self, counts: array[int], bucket_counts: array[int], digests: bytes, names: bytes, held: dict[int, ShardChoice]
    ) -> None:
        self.counts, self.bucket_counts, self.held = counts, bucket_counts, held
        self.digests, self.names = digests, names
        self._of_shard = lru_cache(maxsize=_MAX_FILES)(self._read)

    @property
    def num_buckets(self) -> int:
        """How many buckets there are (B); 0 without buckets."""
        return len(self.bucket_counts) // max(1, len(self.counts))

    def samples(self, shard: int) -> Column | None:
        """Numbers of the chosen samples of a shard, ascending; None: all.

        Raises:
            StorageError: the file with them is gone.
        """
        return self._of_shard(shard).kept

    def bucket(self, shard: int, number: int) -> Column:
        """Places among the chosen samples of a shard of those of a bucket; errors as in `samples`."""
        return self._of_shard(shard).bucket(number)

    def digest(self, shard: int) -> bytes:
        """What tells the chosen samples of a shard from others; zeros for all of them."""
        return self.digests[_HASH * shard : _HASH * (shard + 1)]

    def _read(self, shard: int) -> ShardChoice:
        name = self.names[_HASH * shard : _HASH * (shard + 1)]
        if shard in self.held:
            return self.held[shard]
        if not any(name):
            return ShardChoice(None, self.counts[shard])
        if (found := ShardChoice.read(choice_file(name))) is None:
            file = choice_file(name)
            raise StorageError(f"cannot read '{file}'", "it is gone or damaged", "run the same command again")
        return found

    def write(self, file: Path) -> None:
        """Keep this for other processes; errors as in `write_columns`."""
        columns = ("counts", "bucket_counts", "digests", "names")
        write_columns(file, {name: getattr(self, name) for name in columns}, {})

    @classmethod
    def read(cls, file: Path) -> Choice | None:
        """What `write` has kept; None if there is no such file, or a damaged one."""
        found = read_columns(file)
        if found is None:
            return None
        columns = {name: bytes(column) for name, column in found[0].items()}
        counts, buckets = array("q", columns["counts"]), array("i", columns["bucket_counts"])
        return cls(counts, buckets, columns["digests"], columns["names"], {})


def choice_file(name: bytes) -> Path:
    """The file of the cache with the chosen samples of a shard."""
    return cache_folder() / f"{name.hex()}.chosen.safetensors"
