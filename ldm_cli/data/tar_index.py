"""The index of one shard: which samples it holds, and where each member's bytes lie.

Members are grouped into samples by webdataset's rule: the key is the path up to the first dot of its last
component, the rest, in lower case, is the extension. Members of one key belong together wherever they stand
in the shard.
"""

from __future__ import annotations

import os
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from struct import Struct
from typing import Any, Literal, TypeAlias

from ldm_cli.data.fingerprint import fingerprint_of_contents
from ldm_cli.data.tar_format import BLOCK, Member, TarDamage, TarScan
from ldm_cli.errors import DataError, InputNotFoundError, StorageError

_KEY_AND_EXTENSION = re.compile(rb"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_META = re.compile(rb"__[^/]*__($|/)")
_ROW = Struct("4I")  # of `ShardIndex.members`
_MAX_MEMBER = 1 << 32
_NEVER_READ = frozenset(("pkl", "pickle", "pyd", "pth", "npy"))

Column: TypeAlias = "array[int] | memoryview"


@dataclass(frozen=True)
class ShardIndex:
    """What a shard holds, in a few arrays (N samples, M members).

    Attributes:
        file_size: bytes of the shard.
        end: offset of the end-of-archive blocks (of the damage, if the shard is cut).
        extensions: the extensions that occur, lower-case, without the first dot.
        ignored: how many members were passed over, by reason.
        keys: all keys in UTF-8, one after the other.
        key_ends: uint32 [N], where each key ends in `keys`.
        sample_starts: uint32 [N+1]; sample i has the members `sample_starts[i]` … `sample_starts[i+1] - 1`.
        members: uint32 [4M], four numbers each: number of the extension, offset in blocks, size, CRC-32 of the header.
        contents: the shard's `fingerprint_of_contents`.
        damage: the damage of the shard, if it was to be read up to there; else None.
        sha256: of the whole file, where it was asked for.
        chosen: the samples to use, in this order; None: all of them.
    """

    file_size: int
    end: int
    extensions: tuple[str, ...]
    ignored: dict[str, int]
    keys: bytes | memoryview
    key_ends: Column
    sample_starts: Column
    members: Column
    contents: str
    damage: str | None = None
    sha256: str | None = None
    chosen: Column | None = None

    @property
    def num_samples(self) -> int:
        """How many samples there are, good or not."""
        return len(self.key_ends if self.chosen is None else self.chosen)

    def key(self, sample: int) -> str:
        """The key of a sample."""
        own = sample if self.chosen is None else self.chosen[sample]
        return str(self.keys[self.key_ends[own - 1] if own else 0 : self.key_ends[own]], "utf-8")

    def has_keys_of(self, other: ShardIndex) -> bool:
        """Whether the samples of both have the same keys in the same order."""
        if self.chosen is None and other.chosen is None:
            return self.keys == other.keys and self.key_ends == other.key_ends
        numbers = range(self.num_samples)
        return len(numbers) == other.num_samples and all(self.key(n) == other.key(n) for n in numbers)

    def extension_counts(self) -> dict[str, int]:
        """How many members there are of each extension, of all samples."""
        return {self.extensions[number]: count for number, count in Counter(self.members[::4]).items()}

    def sample(self, sample: int) -> dict[str, list[Member]]:
        """The members of a sample by extension; a list of two is a duplicate that makes it unusable."""
        found: dict[str, list[Member]] = {}
        own = sample if self.chosen is None else self.chosen[sample]
        rows = self.members[4 * self.sample_starts[own] : 4 * self.sample_starts[own + 1]]
        for extension, block, size, header_crc in _ROW.iter_unpack(rows):
            found.setdefault(self.extensions[extension], []).append(Member(block * BLOCK, size, header_crc))
        return found


def _columns(keys: Sequence[bytes], members: Sequence[array[int]]) -> dict[str, Any]:
    """The arrays of a `ShardIndex`, from key and members of each sample."""
    return {
        "keys": b"".join(keys),
        "key_ends": array("I", accumulate(map(len, keys))),
        "sample_starts": array("I", accumulate((len(rows) // 4 for rows in members), initial=0)),
        "members": array("I", b"".join(members)),
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
        self._samples: dict[bytes, array[int]] = defaultdict(lambda: array("I"))  # rows as in ShardIndex.members
        self._extensions: dict[str, int] = {}
        self._last = b""  # key of the last member

    def add(self, name: bytes, member: Member) -> None:
        """Take a member, or count why not."""
        found = split_name(name)
        if isinstance(found, str):
            self.ignored[found] += 1
            return
        if member.size >= _MAX_MEMBER:
            self.ignored["member of 4 GiB or more"] += 1
            return
        self._last, extension = found
        number = self._extensions.setdefault(extension, len(self._extensions))
        self._samples[self._last].extend((number, member.offset // BLOCK, member.size, member.header_crc))

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
