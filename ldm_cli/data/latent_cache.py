"""What a frozen autoencoder and a frozen text encoder say about a data set, kept on disk and read in their place.

A cache is a folder of WebDataset shards and of `cache.json`, which is written last:

    latents-HASH.tar        KEY.moments.safetensors   one for each shard, sample by sample in the same order; HASH is of
                            KEY.bad.json              the shard's content, the autoencoder and the preprocessing
    text-HASH-000000.tar    DIGEST.states.safetensors each distinct caption once, and the empty one; HASH is of the
                            DIGEST.txt                text encoder and its tokenizer

So a file that is there under its name is right, whoever wrote it and when.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ldm_cli.data.bad_samples import BadSampleError
from ldm_cli.data.config import DataConfig
from ldm_cli.data.open_shards import index_shards
from ldm_cli.data.sample_decoder import Draw, Encoding, Sample, SampleDecoder, Wanted
from ldm_cli.data.shards import ShardReader, ShardSet
from ldm_cli.data.tar_index import Member
from ldm_cli.errors import DataError, InputNotFoundError, StorageError
from ldm_cli.reporting import Reporter

MANIFEST = "cache.json"
VERSION = 1
MOMENTS, BAD, STATES = "moments.safetensors", "bad.json", "states.safetensors"
Dtype = Literal["fp32", "fp16", "bf16"]
DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Facts = dict[str, Any]
_KNOWN_BYTES = 256 * 2**20  # text states kept in memory
_HASH_LENGTH = 16
_DIGEST_LENGTH = 32
_REMEDY = "run `ldm precompute` with this recipe"
_REPLACE = "undo the change, or run `ldm precompute --overwrite` with this recipe"


@dataclass(frozen=True)
class CacheKey:
    """What decides the content of a cache, by the name of what a user would change.

    Attributes:
        latents: for the moments: hash of the autoencoder, how an image is prepared, compute precision.
        text: for the text states: hash of text encoder and tokenizer, compute precision.
        flips: which of the picture as it is (False) and mirrored (True) are kept.
        dtype: type of the numbers that are kept.
    """

    latents: Facts
    text: Facts
    flips: tuple[bool, ...]
    dtype: Dtype = "fp32"

    def latents_file(self, shard_sha256: str) -> str:
        """Name of the file with the moments of a shard of this content."""
        return f"latents-{_hash([VERSION, self.latents, self.flips, self.dtype, shard_sha256])}.tar"

    def text_prefix(self) -> str:
        """Beginning of the names of the files with text states."""
        return f"text-{_hash([VERSION, self.text, self.dtype])}-"


@dataclass(frozen=True)
class CachedShard:
    """A shard that was encoded: enough to know it again wherever it lies."""

    name: str
    sha256: str
    fingerprint: str
    file_size: int
    mtime_ns: int
    file: str
    """The file with its moments."""

    def fits(self, path: Path, reporter: Reporter) -> bool:
        """The shard at `path`, which has the same index, holds the same; read only if its time is another."""
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
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """The manifest of a cache; None where there is none.

        Raises:
            DataError: it cannot be understood.
            StorageError: reading failed.
        """
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_bytes())
            version = content["version"]
            if version == VERSION:
                key = CacheKey(**{**content["key"], "flips": tuple(content["key"]["flips"])})
                shards = tuple(CachedShard(**shard) for shard in content["shards"])
                return cls(key, shards, tuple(content["text_files"]), content["complete"])
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StorageError(f"cannot read '{path}'", error.strerror or str(error)) from error
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"cannot read '{path}'", f"it is no manifest of a cache ({error})") from error
        raise DataError(
            f"cannot read '{path}'", f"version {version}, not {VERSION}", "run `ldm precompute --overwrite`"
        )


def differences(old: CacheKey, new: CacheKey) -> list[str]:
    """Why what `old` describes does not serve who wants `new`; the type of the numbers does not matter."""
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


class LatentCache:
    """An open cache that fits a set of shards.

    Args:
        folder: what `ldm precompute` wrote.
        shards: the data set that is to be read.
        key: what the cache must have been made with; `dtype` does not matter.
        reporter: told about shards that have to be compared.

    Raises:
        InputNotFoundError: there is no cache in `folder`.
        DataError: it is not complete, damaged, or stale: made of other shards, by other models or with another
            preprocessing, each of which is named.
    """

    def __init__(self, folder: Path, shards: ShardSet, key: CacheKey, reporter: Reporter) -> None:
        manifest = Manifest.read(folder)
        if manifest is None:
            raise InputNotFoundError(f"there is no cache in '{folder}'", f"no {MANIFEST}", _REMEDY)
        if not manifest.complete:
            raise DataError(f"the cache in '{folder}' is not complete", "`ldm precompute` was stopped", "run it again")
        if stale := differences(manifest.key, key):
            raise DataError(f"the cache in '{folder}' is stale", "; ".join(stale), _REPLACE)
        self.dtype = manifest.key.dtype
        self._folder, self._source = folder, shards
        files = [folder / shard.file for shard in _matched(folder, manifest, shards, reporter)]
        self._moments = _open(files, reporter)
        self._text = _open([folder / name for name in manifest.text_files], reporter)
        for path, ours, theirs in zip(files, self._moments.indexes, shards.indexes, strict=True):
            same = torch.equal(ours.key_bytes, theirs.key_bytes) and torch.equal(ours.key_ends, theirs.key_ends)
            if not same or len(ours.members) != ours.num_samples:
                raise DataError(
                    f"'{path}' is damaged", "it holds other samples than its shard", "delete it; " + _REMEDY
                )
        self._digests, self._places = _directory(self._text)
        self._moments_reader, self._text_reader = ShardReader(self._moments), ShardReader(self._text)
        # A caption comes back in other samples and other epochs; moments only in other epochs: pages of the file do.
        self._known = lru_cache(maxsize=_KNOWN_BYTES // max(1, self._read_states("").nbytes))(self._read_states)

    def decoder(self, config: DataConfig, wanted: Wanted) -> CachedDecoder:
        """In place of the `SampleDecoder` of the shards."""
        return CachedDecoder(self, self._source, config, wanted)

    def moments(self, shard: int, sample: int, mirrored: bool) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of a sample's latent, each [C, h, w].

        Raises:
            BadSampleError: the picture could not be used.
            DataError, StorageError: the cache has changed, is damaged or cannot be read.
        """
        index = self._moments.indexes[shard]
        extension, *place = index.members[sample].tolist()  # a sample is one member
        data = self._moments_reader.read(shard, Member(*place))
        if index.extensions[extension] == BAD:
            raise BadSampleError(**json.loads(data))
        tensors = _tensors(self._moments.paths[shard], data)
        suffix = "_mirrored" if mirrored else ""
        return tensors["mean" + suffix], tensors["logvar" + suffix]

    def states(self, caption: str) -> Tensor:
        """The text tower's last hidden states of a caption, [L, D], not to be written to; errors as in `moments`."""
        return self._known(caption)

    def _read_states(self, caption: str) -> Tensor:
        key = caption_digest(caption)
        row = int(torch.searchsorted(self._digests, _number(key)))
        if row < len(self._digests):
            shard, sample = self._places[row].tolist()
            if self._text.indexes[shard].key(sample) == key:
                member = self._text.indexes[shard].sample(sample)[STATES][0]
                return _tensors(self._text.paths[shard], self._text_reader.read(shard, member))["states"]
        raise DataError(
            f"the cache in '{self._folder}' is stale", f"it does not know the caption {caption[:60]!r}", _REMEDY
        )

    def close(self) -> None:
        """Close the files."""
        self._moments_reader.close()
        self._text_reader.close()


class CachedDecoder:
    """Samples with their captions out of the shards and their encoding out of a cache; no image is read."""

    def __init__(self, cache: LatentCache, shards: ShardSet, config: DataConfig, wanted: Wanted) -> None:
        self._cache, self._flip_probability = cache, config.flip_probability
        self._decoder = SampleDecoder(shards, config, replace(wanted, image=False))

    def decode(self, shard: int, sample: int, draw: Draw) -> Sample:
        """As `SampleDecoder.decode`: the same caption, mirrored in the same cases, bad for the same reason."""
        told = self._decoder.decode(shard, sample, draw)
        mean, logvar = self._cache.moments(shard, sample, draw.flip < self._flip_probability)
        return replace(told, encoding=Encoding(mean, logvar, self._cache.states(told.caption)))

    def close(self) -> None:
        """Close the files."""
        self._decoder.close()
        self._cache.close()


def caption_digest(caption: str) -> str:
    """Under which name the states of a caption are kept: 128 bits of SHA-256."""
    return hashlib.sha256(caption.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST_LENGTH]


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file.

    Raises:
        StorageError: reading failed.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise StorageError(f"cannot read '{path}'", error.strerror or str(error)) from error


def known_captions(files: Sequence[Path], reporter: Reporter) -> set[str]:
    """Digests of the captions whose states are in these files; errors as in `index_shards`."""
    shards = _open(files, reporter)
    return {index.key(number) for index in shards.indexes for number in range(index.num_samples)}


def _open(files: Sequence[Path], reporter: Reporter) -> ShardSet:
    """Files of a cache; every one of them must be there and whole."""
    return index_shards(tuple(files), "stop", reporter)


def _matched(folder: Path, manifest: Manifest, shards: ShardSet, reporter: Reporter) -> list[CachedShard]:
    """For each shard the entry made of it; a shard is known by what it holds, and by its name if two hold the same."""
    entries = defaultdict(list)
    for entry in manifest.shards:
        entries[entry.fingerprint].append(entry)
    found, changed = [], []
    for path, index in zip(shards.paths, shards.indexes, strict=True):
        candidates = sorted(entries[index.fingerprint()], key=lambda entry: entry.name != path.name)
        match = next((entry for entry in candidates if entry.fits(path, reporter)), None)
        if match is None:
            changed.append(f"'{path}'")
        else:
            found.append(match)
    if changed:
        named = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
        raise DataError(f"the cache in '{folder}' is stale", f"shards are new or have changed: {named}", _REMEDY)
    return found


def _directory(text: ShardSet) -> tuple[Tensor, Tensor]:
    """The first 63 bits of the captions' digests, ascending, int64 [N], and (shard, sample) of each, int64 [N, 2]."""
    numbers, places = [], []
    for shard, (path, index) in enumerate(zip(text.paths, text.indexes, strict=True)):
        if len(index.key_bytes) != _DIGEST_LENGTH * index.num_samples:
            raise DataError(f"'{path}' is damaged", "its keys are no digests of captions", "delete it; " + _REMEDY)
        hexadecimal = bytes(index.key_bytes.tolist()).decode()
        starts = range(0, len(hexadecimal), _DIGEST_LENGTH)
        numbers.append(torch.tensor([_number(hexadecimal[start:]) for start in starts]))
        places.append(torch.stack([torch.full((len(starts),), shard), torch.arange(len(starts))], dim=1))
    ordered, permutation = torch.cat(numbers).sort()
    return ordered, torch.cat(places)[permutation]


def _number(digest: str) -> int:
    return int(digest[:_HASH_LENGTH], 16) >> 1


def _tensors(path: Path, data: bytes) -> dict[str, Tensor]:
    try:
        return load(data)
    except SafetensorError as error:
        raise DataError(f"'{path}' is damaged", str(error), "delete it; " + _REMEDY) from error


def _hash(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:_HASH_LENGTH]


def _shown(value: Any) -> str:
    """A value for a message; of a hash its beginning."""
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else json.dumps(value)
