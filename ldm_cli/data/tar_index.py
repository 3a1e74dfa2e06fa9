"""The index of one shard: which samples it holds, and where each member's bytes lie.

Members are grouped into samples by webdataset's rule: the key is the path up to the first dot of its last
component, the rest, in lower case, is the extension. Members of one key belong together wherever they stand
in the shard.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from struct import Struct
from typing import Any, Literal

from ldm_cli.data.fingerprint import fingerprint_of_contents
from ldm_cli.data.tar_format import Member, TarDamage, TarScan
from ldm_cli.errors import DataError, InputNotFoundError, StorageError

_KEY_AND_EXTENSION = re.compile(rb"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_META = re.compile(rb"__[^/]*__($|/)")
_ROW = Struct("4q")  # of `ShardIndex.members`
_NEVER_READ = frozenset(("pkl", "pickle", "pyd", "pth", "npy"))


@dataclass(frozen=True)
class ShardIndex:
    """What a shard holds, in a few arrays (N samples, M members).

    Attributes:
        file_size: bytes of the shard.
        end: offset of the end-of-archive blocks (of the damage, if the shard is cut).
        extensions: the extensions that occur, lower-case, without the first dot.
        ignored: how many members were passed over, by reason.
        keys: all keys in UTF-8, one after the other.
        key_ends: int64 [N], where each key ends in `keys`.
        sample_starts: int64 [N+1]; sample i has the members `sample_starts[i]` … `sample_starts[i+1] - 1`.
        members: int64 [4M], four numbers each: number of the extension, offset, size, CRC-32 of the header.
        contents: the shard's `fingerprint_of_contents`.
        damage: the damage of the shard, if it was to be read up to there; else None.
        sha256: of the whole file, where it was asked for.
    """

    file_size: int
    end: int
    extensions: tuple[str, ...]
    ignored: dict[str, int]
    keys: bytes
    key_ends: array[int]
    sample_starts: array[int]
    members: array[int]
    contents: str
    damage: str | None = None
    sha256: str | None = None

    @property
    def num_samples(self) -> int:
        """How many samples there are, good or not."""
        return len(self.key_ends)

    def key(self, sample: int) -> str:
        """The key of a sample."""
        return self.keys[self.key_ends[sample - 1] if sample else 0 : self.key_ends[sample]].decode()

    def sample(self, sample: int) -> dict[str, list[Member]]:
        """The members of a sample by extension; a list of two is a duplicate that makes it unusable."""
        found: dict[str, list[Member]] = {}
        for extension, offset, size, header_crc in _ROW.iter_unpack(self._rows(sample)):
            found.setdefault(self.extensions[extension], []).append(Member(offset, size, header_crc))
        return found

    def select(self, samples: Sequence[int]) -> ShardIndex:
        """The index of these samples alone."""
        keys = [self.key(sample).encode() for sample in samples]
        return replace(self, **_columns(keys, [self._rows(sample) for sample in samples]))

    def _rows(self, sample: int) -> array[int]:
        return self.members[4 * self.sample_starts[sample] : 4 * self.sample_starts[sample + 1]]

    def fingerprint(self) -> str:
        """SHA-256 of keys, places, sizes, headers and sampled blocks; the same wherever the shard lies."""
        digest = hashlib.sha256(json.dumps([self.file_size, self.extensions, self.contents]).encode())
        for column in (self.keys, self.key_ends, self.sample_starts, self.members):
            digest.update(column)
        return digest.hexdigest()


def _columns(keys: Sequence[bytes], members: Sequence[array[int]]) -> dict[str, Any]:
    """The arrays of a `ShardIndex`, from key and members of each sample."""
    return {
        "keys": b"".join(keys),
        "key_ends": array("q", accumulate(map(len, keys))),
        "sample_starts": array("q", accumulate((len(rows) // 4 for rows in members), initial=0)),
        "members": array("q", b"".join(members)),
    }


def index_tar(path: Path, on_damage: Literal["stop", "skip"] = "stop") -> ShardIndex:
    """Read the headers of a shard.

    Args:
        path: an uncompressed tar.
        on_damage: `skip` takes exactly the whole samples before the damage; `stop` raises.

    Raises:
        DataError: the shard is damaged (naming the byte), compressed, or no tar at all.
        InputNotFoundError: it is missing, empty or not readable.
        StorageError: reading failed.
    """
    if path.exists() and not path.is_file():
        raise InputNotFoundError(f"cannot read shard '{path}'", "not a regular file", "make or fetch it again")
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputNotFoundError(f"cannot open shard '{path}'", os.strerror(error.errno or 0)) from error
    with file:
        try:
            file_size = os.fstat(file.fileno()).st_size
            if not file_size:
                raise InputNotFoundError(f"cannot read shard '{path}'", "the file is empty", "make or fetch it again")
            return _read(path, TarScan(file, file_size), file_size, on_damage)
        except OSError as error:
            raise StorageError(f"cannot read shard '{path}'", os.strerror(error.errno or 0)) from error


def _read(path: Path, scan: TarScan, file_size: int, on_damage: Literal["stop", "skip"]) -> ShardIndex:
    """Collect the members of `scan` and group them."""
    grouping, damage = _Grouping(), None
    try:
        for name, member in scan:
            grouping.add(name, member)
    except TarDamage as found:
        if "compressed" in found.reason:
            raise DataError(
                f"cannot read shard '{path}'", found.reason, "decompress it: shards are plain tars"
            ) from found
        if on_damage == "stop":
            remedy = "make or fetch it again, or set data.on_bad_shard=skip to use the whole samples before"
            raise DataError(f"shard '{path}' is damaged", str(found), remedy) from found
        damage, scan.end = str(found), found.byte
        grouping.drop_incomplete(found)
    return grouping.index(
        file_size=file_size,
        end=scan.end,
        ignored=dict(sorted((scan.ignored + grouping.ignored).items())),
        contents=fingerprint_of_contents(path),
        damage=damage,
    )


def split_name(name: bytes) -> tuple[bytes, str] | str:
    """Key and extension of a member, or why no sample has it."""
    match = _KEY_AND_EXTENSION.fullmatch(name)
    if match is None:
        return "name without extension"
    if name.startswith(b"__") and _META.match(name):
        return "webdataset meta member"
    if name.startswith(b"/") or (b".." in name and b".." in name.split(b"/")):
        return "absolute or '..' name"
    extension = _extension(match[2])
    return "pickle or array member" if extension is None else (match[1], extension)


@lru_cache(maxsize=1024)
def _extension(suffix: bytes) -> str | None:
    """The extension in lower case; None if it is never read."""
    extension = suffix.lower().decode("utf-8", "backslashreplace")
    return None if extension.rpartition(".")[2] in _NEVER_READ else extension


class _Grouping:
    """Members on their way to becoming samples."""

    def __init__(self) -> None:
        self.ignored: Counter[str] = Counter()
        self._samples: dict[bytes, array[int]] = defaultdict(lambda: array("q"))  # rows as in ShardIndex.members
        self._extensions: dict[str, int] = {}
        self._last = b""  # key of the last member

    def add(self, name: bytes, member: Member) -> None:
        """Take a member, or count why not."""
        found = split_name(name)
        if isinstance(found, str):
            self.ignored[found] += 1
            return
        self._last, extension = found
        self._samples[self._last].extend((self._extensions.setdefault(extension, len(self._extensions)), *member))

    def drop_incomplete(self, damage: TarDamage) -> None:
        """Forget the sample that the damage may have cut.

        If the damaged member's name is known, that is its sample. Otherwise it is the last one, unless it
        already has every extension that any earlier sample has: then the members behind the damage were not
        its own.
        """
        if damage.at_end or not self._samples:
            return
        match = _KEY_AND_EXTENSION.fullmatch(damage.member or b"")
        cut = match[1] if match else self._last
        earlier = {extension for key, rows in self._samples.items() if key != cut for extension in rows[::4]}
        if match or not earlier or not earlier <= {*self._samples[cut][::4]}:
            self._samples.pop(cut, None)

    def index(self, **facts: Any) -> ShardIndex:
        """The finished index, members sorted by sample and otherwise in file order; `facts` are its other fields."""
        keys = [key.decode("utf-8", "backslashreplace").encode() for key in self._samples]
        columns = _columns(keys, [*self._samples.values()])
        return ShardIndex(extensions=tuple(self._extensions), **columns, **facts)
