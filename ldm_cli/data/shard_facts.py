"""What is known of every shard of a data set without its table: a few numbers each, in a file that all processes share.

Opening a data set reads this file alone. It is used only if the stamps of all shards are those of the file;
otherwise it is put together again from the tables, whose heads hold the same facts, and from new indexes.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ldm_cli.data.columns import read_columns, write_columns
from ldm_cli.data.index_cache import Stamp, cache_folder
from ldm_cli.data.shard_paths import ShardPaths
from ldm_cli.data.tar_index import ShardIndex

_VERSION = 1
_HASH = 32
_NUM_STAMPS = 3


@dataclass(frozen=True)
class ShardFact:
    """What is known of one shard.

    Attributes:
        num_samples: good or not.
        stamp: of the file.
        contents: its `fingerprint_of_contents`.
        sha256: of the whole file, where it was asked for.
        ignored: how many members were passed over, by reason.
        members: how many there are of each extension.
        is_indexed: False if a file beside the shard gave `num_samples`, and there is no table.
        held: the index, if no file could keep it.
        problem: why no file could keep it, unless it is damaged.
    """

    num_samples: int
    stamp: Stamp
    contents: str
    sha256: str | None = None
    ignored: dict[str, int] = field(default_factory=dict)
    members: dict[str, int] = field(default_factory=dict)
    is_indexed: bool = True
    held: ShardIndex | None = None
    problem: str | None = None


@dataclass(frozen=True)
class ShardFacts:
    """The facts of all shards (N of them), in columns.

    Attributes:
        counts: int64 [N], samples of each shard.
        stamps: int64 [3 N].
        contents: 32 bytes a shard.
        hashes: 32 bytes a shard, or nothing unless all were hashed whole.
        ignored: how many members were passed over, by reason.
        members: how many there are of each extension, in the shards that are indexed.
        is_indexed: whether every shard was indexed.
    """

    counts: array[int]
    stamps: array[int]
    contents: bytes
    hashes: bytes
    ignored: dict[str, int]
    members: dict[str, int]
    is_indexed: bool

    @classmethod
    def of(cls, facts: Iterable[ShardFact]) -> ShardFacts:
        """The columns of these facts, shard by shard."""
        counts, stamps = array("q"), array("q")
        contents, hashes = bytearray(), bytearray()
        ignored, members, is_indexed = Counter[str](), Counter[str](), True
        for fact in facts:
            counts.append(fact.num_samples)
            stamps.extend(fact.stamp)
            contents += bytes.fromhex(fact.contents)
            hashes += bytes.fromhex(fact.sha256 or "")
            ignored.update(fact.ignored)
            members.update(fact.members)
            is_indexed &= fact.is_indexed
        whole = bytes(hashes) if len(hashes) == len(contents) else b""
        return cls(
            counts,
            stamps,
            bytes(contents),
            whole,
            dict(sorted(ignored.items())),
            dict(sorted(members.items())),
            is_indexed,
        )

    def contents_of(self, shard: int) -> str:
        """The `fingerprint_of_contents` of a shard."""
        return self.contents[_HASH * shard : _HASH * (shard + 1)].hex()

    def sha256_of(self, shard: int) -> str:
        """The hash of a shard's every byte; empty if it is not known."""
        return self.hashes[_HASH * shard : _HASH * (shard + 1)].hex()

    def stamp_of(self, shard: int) -> Stamp:
        """The stamp of a shard."""
        size, first, second = self.stamps[_NUM_STAMPS * shard : _NUM_STAMPS * (shard + 1)]
        return size, first, second


def read_shard_facts(paths: ShardPaths, stamps: array[int] | None) -> ShardFacts | None:
    """The facts that are kept of these shards; None if there are none, or those of other files.

    Args:
        stamps: those of the shards now; None: not compared.
    """
    found = read_columns(_file(paths))
    if found is None or found[1].get("version") != _VERSION:
        return None
    columns, facts = found
    counts, known = (array("q", bytes(columns[name])) for name in ("counts", "stamps"))
    if len(counts) != len(paths) or (stamps is not None and stamps != known):
        return None
    hashes, contents = bytes(columns["hashes"]), bytes(columns["contents"])
    return ShardFacts(counts, known, contents, hashes, facts["ignored"], facts["members"], facts["is_indexed"])


def write_shard_facts(paths: ShardPaths, facts: ShardFacts) -> None:
    """Keep the facts for other processes; errors as in `write_columns`."""
    columns = {name: getattr(facts, name) for name in ("counts", "stamps", "contents", "hashes")}
    others = {name: getattr(facts, name) for name in ("ignored", "members", "is_indexed")}
    write_columns(_file(paths), columns, {"version": _VERSION, **others})


def _file(paths: ShardPaths) -> Path:
    here = b"" if paths.text.startswith(b"/") else os.fsencode(Path.cwd())
    return cache_folder() / f"{hashlib.sha256(here + bytes(1) + paths.text).hexdigest()[:32]}.set.safetensors"
