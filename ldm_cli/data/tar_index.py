"""The index of one shard: which samples it holds, and where each member's bytes lie.

Members are grouped into samples by webdataset's rule: the key is the path up to the first dot of its last
component, the rest, in lower case, is the extension. Members of one key belong together wherever they stand
in the shard.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from struct import Struct
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ldm_cli.data.tar_format import Member, TarDamage, TarScan
from ldm_cli.errors import DataError, InputNotFoundError, StorageError

_KEY_AND_EXTENSION = re.compile(rb"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_META = re.compile(rb"__[^/]*__($|/)")
_ROW = Struct("4q")  # of `ShardIndex.members`
_NEVER_READ = frozenset(("pkl", "pickle", "pyd", "pth", "npy"))


class _Views(NamedTuple):
    key_bytes: bytes
    key_ends: memoryview
    sample_starts: memoryview
    members: memoryview


def _view(tensor: Tensor) -> memoryview:
    """The numbers of a contiguous int64 tensor, which must outlive the view, in its memory."""
    return memoryview((ctypes.c_int64 * tensor.numel()).from_address(tensor.data_ptr())).cast("B").cast("q")


@dataclass(frozen=True)
class ShardIndex:
    """What a shard holds, as a handful of tensors (N samples, M members, K bytes of keys).

    Attributes:
        file_size: bytes of the shard.
        end: offset of the end-of-archive blocks (of the damage, if the shard is cut).
        extensions: the extensions that occur, lower-case, without the first dot.
        ignored: how many members were passed over, by reason.
        key_bytes: uint8 [K], all keys in UTF-8, one after the other.
        key_ends: int64 [N], where each key ends in `key_bytes`.
        sample_starts: int64 [N+1]; sample i has the members `sample_starts[i]` … `sample_starts[i+1] - 1`.
        members: int64 [M, 4]: number of the extension, offset, size, CRC-32 of the header.
        damage: what is wrong with the shard, if it was to be read up to there; else None.
    """

    file_size: int
    end: int
    extensions: tuple[str, ...]
    ignored: dict[str, int]
    key_bytes: Tensor
    key_ends: Tensor
    sample_starts: Tensor
    members: Tensor
    damage: str | None = None

    @property
    def num_samples(self) -> int:
        """How many samples there are, good or not."""
        return len(self.key_ends)

    def key(self, sample: int) -> str:
        """The key of a sample."""
        key_ends = self._views.key_ends
        return self._views.key_bytes[key_ends[sample - 1] if sample else 0 : key_ends[sample]].decode()

    def sample(self, sample: int) -> dict[str, list[Member]]:
        """The members of a sample by extension; a list of two is a duplicate that makes it unusable."""
        _, _, starts, members = self._views
        rows = members[starts[sample] * _ROW.size : starts[sample + 1] * _ROW.size]
        found: dict[str, list[Member]] = {}
        for extension, offset, size, header_crc in _ROW.iter_unpack(rows):
            found.setdefault(self.extensions[extension], []).append(Member(offset, size, header_crc))
        return found

    def select(self, samples: Sequence[int]) -> ShardIndex:
        """The index of these samples alone."""
        keys = [self.key(sample).encode() for sample in samples]
        chosen = torch.tensor(samples, dtype=torch.int64)
        counts = (self.sample_starts[1:] - self.sample_starts[:-1])[chosen]
        owner = torch.repeat_interleave(torch.arange(len(chosen)), counts)
        starts = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
        rows = self.sample_starts[chosen][owner] + torch.arange(len(owner)) - starts[owner]
        return replace(
            self,
            key_bytes=torch.frombuffer(bytearray(b"".join(keys) or b"\0"), dtype=torch.uint8),
            key_ends=torch.tensor([len(key) for key in keys], dtype=torch.int64).cumsum(0),
            sample_starts=starts,
            members=self.members[rows],
        )

    @cached_property
    def _views(self) -> _Views:
        """The tensors as Python reads them fastest."""
        return _Views(
            ctypes.string_at(self.key_bytes.data_ptr(), self.key_bytes.nbytes),
            _view(self.key_ends),
            _view(self.sample_starts),
            _view(self.members).cast("B"),
        )

    def fingerprint(self) -> str:
        """SHA-256 of keys, places, sizes and headers; the same wherever the shard lies."""
        digest = hashlib.sha256(json.dumps([self.file_size, self.extensions]).encode())
        for tensor in (self.key_bytes, self.key_ends, self.sample_starts, self.members):
            digest.update(ctypes.string_at(tensor.data_ptr(), tensor.nbytes))
        return digest.hexdigest()


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
    grouping = _Grouping()
    damage, cut = None, None
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
        damage, cut, scan.end = str(found), grouping.cut_sample(found), found.byte
    index = grouping.index(file_size, scan.end, scan.ignored + grouping.ignored, damage)
    return index if cut is None else index.select([n for n in range(index.num_samples) if n != cut])


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
        self._samples: dict[bytes, int] = {}  # key to number, in order of first appearance
        self._extensions: dict[str, int] = {}
        self._owner = array("q")  # number of each member's sample
        self._rows = array("q")  # four numbers per member, as in ShardIndex.members

    def add(self, name: bytes, member: Member) -> None:
        """Take a member, or count why not."""
        found = split_name(name)
        if isinstance(found, str):
            self.ignored[found] += 1
            return
        key, extension = found
        self._owner.append(self._samples.setdefault(key, len(self._samples)))
        self._rows.extend((self._extensions.setdefault(extension, len(self._extensions)), *member))

    def cut_sample(self, damage: TarDamage) -> int | None:
        """The number of the sample that the damage may have cut.

        If the damaged member's name is known, that is its sample. Otherwise it is the last one, unless it
        already has every extension that any earlier sample has: then the members behind the damage were not
        its own.
        """
        if damage.at_end or not self._owner:
            return None
        if not isinstance(found := split_name(damage.member or b""), str):
            return self._samples.get(found[0])
        last = self._owner[-1]
        own = {extension for extension, owner in zip(self._rows[::4], self._owner, strict=True) if owner == last}
        earlier = {extension for extension, owner in zip(self._rows[::4], self._owner, strict=True) if owner != last}
        return None if earlier and own >= earlier else last

    def index(self, file_size: int, end: int, ignored: Counter[str], damage: str | None) -> ShardIndex:
        """The finished index, members sorted by sample and otherwise in file order."""
        keys = [key.decode("utf-8", "backslashreplace").encode() for key in self._samples]
        owner = torch.tensor(self._owner, dtype=torch.int64)
        order = torch.argsort(owner, stable=True)
        counts = torch.bincount(owner, minlength=len(keys))
        return ShardIndex(
            file_size=file_size,
            end=end,
            extensions=tuple(self._extensions),
            ignored=dict(sorted(ignored.items())),
            key_bytes=torch.frombuffer(bytearray(b"".join(keys) or b"\0"), dtype=torch.uint8),
            key_ends=torch.tensor([len(key) for key in keys], dtype=torch.int64).cumsum(0),
            sample_starts=torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0))),
            members=torch.tensor(self._rows, dtype=torch.int64).view(-1, 4)[order],
            damage=damage,
        )
