"""Moments of images and conditions of captions, kept on disk: read in place of computing them.

A cache is a folder of WebDataset shards and of `cache.json`, which is written last:

    latents-HASH-OWN.tar      KEY.moments.safetensors       one for each shard, sample by sample in the same order; HASH
                              KEY.bad.json                  is of the shard's content, the codec and the preprocessing
    text-HASH-000000-OWN.tar  DIGEST.condition.safetensors  each distinct caption once, and the empty one; HASH is of
                              DIGEST.txt                    the encoder's key

OWN is the hash of the file's own content. It is compared when a process first reads a sample of the file.
Moments are the tensors of `Codec.moments`, `mask` [1, h, w] where the recipe names one, and `sizes` those of
`picture_sizes`, with `_mirrored` after the names for mirrored pictures; conditions are the fields of `Condition`. A
file whose content is that of its name is right, whoever wrote it and when.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ldm_cli.data.bad_samples import BadSampleError
from ldm_cli.data.cache_manifest import MANIFEST, REMEDY, CachedShard, CacheKey, Manifest, differences, is_whole
from ldm_cli.data.config import DataConfig
from ldm_cli.data.open_shards import index_shards
from ldm_cli.data.sample_decoder import Draw, Sample, SampleDecoder, Wanted
from ldm_cli.data.shards import ShardReader, ShardSet
from ldm_cli.errors import DataError, InputNotFoundError
from ldm_cli.reporting import Reporter

MOMENTS, BAD, CONDITION = "moments.safetensors", "bad.json", "condition.safetensors"
MIRRORED = "_mirrored"
SIZES = "sizes"
MASK = "mask"
_KNOWN_BYTES = 256 * 2**20  # conditions kept in memory
_HEX_OF_63_BITS = 16
_DIGEST_LENGTH = 32
_REPLACE = "undo the change, or run `ldm precompute --overwrite` with this recipe"


class LatentCache:
    """An open cache that fits a set of shards.

    Args:
        folder: of the cache, written by `ldm precompute`.
        key: the models and settings that the cache must be made of; its `dtype` is not compared.
        reporter: receives a message for each shard whose content has to be compared.

    Raises:
        InputNotFoundError: there is no cache in `folder`.
        DataError: it is not complete, damaged, or stale: made of other shards, by other models or with another
            preprocessing, each of which is named.
    """

    def __init__(self, folder: Path, shards: ShardSet, key: CacheKey, reporter: Reporter) -> None:
        manifest = Manifest.read(folder)
        if manifest is None:
            raise InputNotFoundError(f"there is no cache in '{folder}'", f"no {MANIFEST}", REMEDY)
        if not manifest.complete:
            raise DataError(f"the cache in '{folder}' is not complete", "`ldm precompute` was stopped", "run it again")
        if stale := differences(manifest.key, key):
            raise DataError(f"the cache in '{folder}' is stale", "; ".join(stale), _REPLACE)
        self.dtype = manifest.key.dtype
        self._folder, self._source = folder, shards
        files = [folder / shard.file for shard in _matched(folder, manifest, shards, reporter)]
        self._moments = _open(files, reporter)
        self._verified: set[Path] = set()
        self._matching: set[int] = set()
        self._moments_reader = ShardReader(self._moments)
        self._text_reader: ShardReader | None = None
        self._known: Callable[[str], dict[str, Tensor]] = lambda _: {}
        if manifest.text_files:
            self._open_text(manifest, reporter)

    def _open_text(self, manifest: Manifest, reporter: Reporter) -> None:
        self._text = _open([self._folder / name for name in manifest.text_files], reporter)
        self._digests, self._places = _directory(self._text)
        self._text_reader = ShardReader(self._text)
        # A caption comes back in other samples and other epochs; moments only in other epochs: pages of the file do.
        size = sum(tensor.nbytes for tensor in self._read_condition("").values())
        self._known = lru_cache(maxsize=_KNOWN_BYTES // max(1, size))(self._read_condition)

    def decoder(self, config: DataConfig, wanted: Wanted) -> CachedDecoder:
        """A decoder that takes the place of the shards' `SampleDecoder`."""
        return CachedDecoder(self, self._source, config, wanted)

    def moments(self, shard: int, sample: int, mirrored: bool) -> dict[str, Tensor]:
        """The codec's moments of a sample's image and its `sizes`, each without the batch dimension.

        Raises:
            BadSampleError: the picture could not be used.
            DataError, StorageError: the cache has changed, is damaged or cannot be read.
        """
        index = self._moments.indexes[shard]
        if shard not in self._matching:
            if not index.has_keys_of(self._source.indexes[shard]) or index.sample_starts[-1] != index.num_samples:
                path = self._moments.paths[shard]
                raise DataError(f"'{path}' is damaged", "it holds other samples than its shard", REMEDY)
            self._matching.add(shard)
        ((extension, (member,)),) = index.sample(sample).items()
        self._expect_whole(self._moments.paths[shard])
        data = self._moments_reader.read(shard, member)
        if extension == BAD:
            raise BadSampleError(**json.loads(data))
        tensors = _tensors(self._moments.paths[shard], data)
        return {n.removesuffix(MIRRORED): t for n, t in tensors.items() if n.endswith(MIRRORED) == mirrored}

    def condition(self, caption: str) -> dict[str, Tensor]:
        """The fields of a caption's condition, each without the batch dimension and not to be written to; none in a
        cache of images alone. Errors as in `moments`."""
        return self._known(caption)

    def _read_condition(self, caption: str) -> dict[str, Tensor]:
        assert self._text_reader is not None
        key = caption_digest(caption)
        row = int(torch.searchsorted(self._digests, _number(key)))
        if row < len(self._digests):
            shard, sample = self._places[row].tolist()
            if self._text.indexes[shard].key(sample) == key:
                self._expect_whole(self._text.paths[shard])
                member = self._text.indexes[shard].sample(sample)[CONDITION][0]
                return _tensors(self._text.paths[shard], self._text_reader.read(shard, member))
        raise DataError(
            f"the cache in '{self._folder}' is stale", f"it does not know the caption {caption[:60]!r}", REMEDY
        )

    def _expect_whole(self, file: Path) -> None:
        """Compare a file with its name, when it is first read."""
        if file not in self._verified:
            if not is_whole(file):
                raise DataError(f"'{file}' is damaged", "its content is not that of its name", REMEDY)
            self._verified.add(file)

    def close(self) -> None:
        """Close the files."""
        self._moments_reader.close()
        if self._text_reader is not None:
            self._text_reader.close()


class CachedDecoder:
    """Samples whose captions are out of the shards, and whose moments and conditions are out of a cache."""

    def __init__(self, cache: LatentCache, shards: ShardSet, config: DataConfig, wanted: Wanted) -> None:
        self._cache, self._flip_probability = cache, config.flip_probability
        self._decoder = SampleDecoder(shards, config, replace(wanted, image=False))

    def decode(self, shard: int, sample: int, draw: Draw) -> Sample:
        """As `SampleDecoder.decode`: the same caption, mirrored in the same cases, bad for the same reason."""
        plain = self._decoder.decode(shard, sample, draw)
        moments = self._cache.moments(shard, sample, draw.flip < self._flip_probability)
        sizes = moments.pop(SIZES)
        return replace(plain, sizes=sizes, moments=moments, condition=self._cache.condition(plain.caption))

    def keep(self, shards: Collection[int]) -> None:
        """Close the files of all other shards."""
        self._decoder.keep(shards)

    def close(self) -> None:
        """Close the files."""
        self._decoder.close()
        self._cache.close()


def caption_digest(caption: str) -> str:
    """The name of a caption in the files: 128 bits of SHA-256."""
    return hashlib.sha256(caption.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST_LENGTH]


def known_captions(files: Sequence[Path], reporter: Reporter) -> set[str]:
    """Digests of the captions in these files; errors as in `index_shards`."""
    shards = _open(files, reporter)
    return {index.key(number) for index in shards.indexes for number in range(index.num_samples)}


def _open(files: Sequence[Path], reporter: Reporter) -> ShardSet:
    """Files of a cache; each must exist and be complete."""
    try:
        return index_shards(tuple(files), "stop", reporter)
    except (DataError, InputNotFoundError) as error:
        raise type(error)(error.what, error.cause, REMEDY) from error


def _matched(folder: Path, manifest: Manifest, shards: ShardSet, reporter: Reporter) -> list[CachedShard]:
    """For each shard its entry: the one of the same content; of several, the one of the same name."""
    entries = defaultdict(list)
    for entry in manifest.shards:
        entries[entry.fingerprint].append(entry)
    found, changed = [], []
    for shard, path in enumerate(shards.paths):
        candidates = sorted(entries[shards.fingerprint_of(shard)], key=lambda entry: entry.name != path.name)
        is_remote = shards.paths.address(shard) is not None  # a copy that is fetched again has another time
        match = next((entry for entry in candidates if is_remote or entry.fits(path, reporter)), None)
        if match is None:
            changed.append(f"'{path}'")
        else:
            found.append(match)
    if changed:
        named = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
        raise DataError(f"the cache in '{folder}' is stale", f"shards are new or have changed: {named}", REMEDY)
    return found


def _directory(text: ShardSet) -> tuple[Tensor, Tensor]:
    """The first 63 bits of the captions' digests, ascending, int64 [N], and (shard, sample) of each, int64 [N, 2]."""
    numbers, places = [], []
    for shard, (path, index) in enumerate(zip(text.paths, text.indexes, strict=True)):
        if len(index.keys) != _DIGEST_LENGTH * index.num_samples:
            raise DataError(f"'{path}' is damaged", "its keys are no digests of captions", REMEDY)
        hexadecimal = str(index.keys, "utf-8")
        starts = range(0, len(hexadecimal), _DIGEST_LENGTH)
        numbers.append(torch.tensor([_number(hexadecimal[start:]) for start in starts]))
        places.append(torch.stack([torch.full((len(starts),), shard), torch.arange(len(starts))], dim=1))
    ordered, permutation = torch.cat(numbers).sort()
    return ordered, torch.cat(places)[permutation]


def _number(digest: str) -> int:
    return int(digest[:_HEX_OF_63_BITS], 16) >> 1


def _tensors(path: Path, data: bytes) -> dict[str, Tensor]:
    try:
        return load(data)
    except SafetensorError as error:
        raise DataError(f"'{path}' is damaged", str(error), REMEDY) from error
