"""What is in a latent cache, and whether it fits: the content of `cache.json`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ldm_cli.errors import DataError
from ldm_cli.inputs import MOST_PICTURE_BYTES, read_input
from ldm_cli.reporting import Reporter
from ldm_cli.storage import file_sha256, is_sealed, sealed

MANIFEST = "cache.json"
VERSION = 4
Dtype = Literal["fp32", "fp16", "bf16"]
Facts = dict[str, Any]
REMEDY = "run `ldm precompute` with this recipe"
_HASH_LENGTH = 16


@dataclass(frozen=True)
class CacheKey:
    """What decides the content of a cache, by names that a user knows.

    Attributes:
        latents: of the moments: the codec's hash, how an image is prepared, compute precision.
        text: of the conditions: the encoder's key, compute precision.
        flips: False for pictures as they are, True for mirrored pictures, or both.
        dtype: type of the numbers in the files; integers keep theirs.
    """

    latents: Facts
    text: Facts
    flips: tuple[bool, ...]
    dtype: Dtype = "fp32"

    def latents_stem(self, shard_sha256: str) -> str:
        """Beginning of the name of the file with the moments of a shard of this content."""
        return f"latents-{_hash([VERSION, self.latents, self.flips, self.dtype, shard_sha256])}"

    def text_stem(self) -> str:
        """Beginning of the names of the files with conditions."""
        return f"text-{_hash([VERSION, self.text, self.dtype])}"


@dataclass(frozen=True)
class CachedShard:
    """A shard that was encoded: enough to recognise it wherever it lies."""

    name: str
    sha256: str
    fingerprint: str
    file_size: int
    mtime_ns: int
    file: str = ""
    """The file with its moments, once there is one."""

    @classmethod
    def of(cls, path: Path, fingerprint: str, known: Sequence[CachedShard]) -> CachedShard:
        """The shard at `path`, whose index has that fingerprint; it is read unless it is `known`.

        Raises:
            StorageError: reading failed.
        """
        status = path.stat()
        same = (path.name, fingerprint, status.st_size, status.st_mtime_ns)
        for entry in known:
            if (entry.name, entry.fingerprint, entry.file_size, entry.mtime_ns) == same:
                return entry
        return cls(path.name, file_sha256(path), fingerprint, status.st_size, status.st_mtime_ns)

    def fits(self, path: Path, reporter: Reporter) -> bool:
        """Whether the shard at `path`, whose index is the same, is the same; it is read only if its time differs."""
        status = path.stat()
        if (status.st_size, status.st_mtime_ns) == (self.file_size, self.mtime_ns):
            return True
        reporter.info(f"'{path}' has another time than when it was encoded: comparing its content")
        return status.st_size == self.file_size and file_sha256(path) == self.sha256


@dataclass(frozen=True)
class Manifest:
    """The content of cache.json."""

    key: CacheKey
    shards: tuple[CachedShard, ...] = ()
    text_files: tuple[str, ...] = ()
    complete: bool = False
    """False until everything was written for the first time."""

    def to_json(self) -> str:
        """As it is written."""
        return json.dumps(sealed({"version": VERSION, **asdict(self)}), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """The manifest of a cache; None where there is none.

        Raises:
            DataError: it is damaged, or of another version.
            InputNotFoundError, StorageError: it cannot be read.
        """
        path = folder / MANIFEST
        if not os.path.lexists(path):
            return None
        try:
            content = json.loads(read_input(path, MOST_PICTURE_BYTES))
            version = content["version"]
            if not is_sealed(content):
                raise ValueError("not what was written")
            if version == VERSION:
                key = CacheKey(**{**content["key"], "flips": tuple(content["key"]["flips"])})
                shards = tuple(CachedShard(**shard) for shard in content["shards"])
                return cls(key, shards, tuple(content["text_files"]), content["complete"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"'{path}' is damaged", f"no manifest of a cache ({error!r:.80})", REMEDY) from error
        raise DataError(f"cannot use '{path}'", f"version {version}, not {VERSION}", REMEDY)


def differences(old: CacheKey, new: CacheKey) -> list[str]:
    """Why a cache of key `old` does not serve where `new` is wanted; the type of the numbers does not matter."""
    found: list[str] = []
    for before, now in ((old.latents, new.latents), (old.text, new.text)):
        for name in now:
            if before.get(name) != now[name] and not any(name in text for text in found):
                found.append(f"{name} was {_shown(before.get(name))} and is {_shown(now[name])}")
    if not set(new.flips) <= set(old.flips):
        found.append(
            "data.flip_probability asks for pictures that are " + ("" if True in new.flips else "not ") + "mirrored"
        )
    return found


def whole_name(stem: str, file: Path) -> str:
    """`STEM-HASH.tar`, where the hash is of the file's content.

    Raises:
        OSError: reading failed.
    """
    return f"{stem}-{file_sha256(file)[:_HASH_LENGTH]}.tar"


def is_whole(file: Path) -> bool:
    """Whether a file has the content that its name says."""
    return file.is_file() and file.name == whole_name(stem_of(file), file)


def stem_of(file: Path) -> str:
    """The stem of `whole_name`."""
    return file.name.rpartition("-")[0]


def _hash(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:_HASH_LENGTH]


def _shown(value: Any) -> str:
    """A value for a message; of a hash its beginning."""
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else json.dumps(value)
