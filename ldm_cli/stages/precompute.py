"""`ldm precompute`: what frozen models make of training data, computed once and written to a cache."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeVar

from ldm_cli.data.cache_manifest import CachedShard, CacheKey, Dtype, Manifest, differences, stem_of
from ldm_cli.data.cache_writer import (
    bad_members,
    caption_members,
    file_of,
    find_whole,
    locked,
    manifest_to_update,
    moments_members,
    remove_orphans,
    write_file,
    write_manifest,
)
from ldm_cli.data.latent_cache import caption_digest, known_captions
from ldm_cli.data.open_shards import open_shards
from ldm_cli.data.prefetch import prefetched
from ldm_cli.data.sample_decoder import SampleDecoder, Wanted
from ldm_cli.data.shards import ShardSet
from ldm_cli.data.to_device import sent_to_device
from ldm_cli.errors import OutputError, Preempted
from ldm_cli.reporting import Progress, Reporter
from ldm_cli.stages.support.batch_encoder import cache_key
from ldm_cli.stages.support.cache_encoding import (
    CachedRecipe,
    CacheEncoder,
    Chunks,
    EncodedChunk,
    FrozenEncoder,
    bytes_per_sample,
    open_encoder,
)
from ldm_cli.stages.support.named_models import with_model_folders
from ldm_cli.stages.support.options import RunOptions, resolve_device, with_precision
from ldm_cli.stages.support.start import resolve_start
from ldm_cli.storage import expect_room
from ldm_cli.training.distributed import SECONDS_OF_SILENCE, joined, local_rank
from ldm_cli.training.failures import FailureJournal
from ldm_cli.training.interruption import TIME_LIMIT, StopRequest
from ldm_cli.training.ranks import Ranks

T = TypeVar("T")

_CAPTIONS_PER_FILE = 10_000


def run(recipe: CachedRecipe, options: RunOptions, reporter: Reporter, dtype: Dtype | None = None) -> dict[str, Any]:
    """Write the cache of `recipe`, go on with one that was interrupted, or bring one up to date with the shards.

    Args:
        dtype: type of the numbers kept; None: that of the cache that is there, else fp32.

    Returns:
        `cache` (its folder), `dtype`, `samples`, `encoded` (of them, now), `captions` (distinct ones),
        `removed_files`, `bytes`, `seconds`.

    Raises:
        RecipeError: the recipe crops at random, or to the shapes of aspect buckets.
        OutputError: the folder holds a cache made with other models or settings.
        Preempted: a signal or the time limit; what is written stays.
        StorageError: the disk is full.
        StuckError: the time limit left room for no file, run after run.
    """
    started = time.perf_counter()
    recipe = with_precision(resolve_start(with_model_folders(recipe, reporter), reporter.warn), options)
    device = resolve_device(options.device, local_rank())
    with StopRequest(options.max_time) as stop, joined(device, SECONDS_OF_SILENCE) as ranks:
        wanted = cache_key(recipe)
        with ranks.first_then_others():
            shards = open_shards(recipe.data.shards, recipe.data, reporter)
        folder = _folder(recipe, options, shards)
        with locked(folder) if ranks.is_first else nullcontext():
            ranks.wait()
            failures = FailureJournal(folder / "failures.jsonl", "file")
            failures.check()
            before, is_damaged = manifest_to_update(folder, reporter.warn)
            key = _key_to_use(folder, before, wanted, dtype, options.overwrite)
            encoder = open_encoder(recipe, device, reporter.warn)
            work = _Precomputation(recipe, folder, shards, key, encoder, stop, reporter, failures, ranks)
            counts = work.run(before, is_damaged)
    size = sum(path.stat().st_size for path in folder.glob("*.tar"))
    seconds = round(time.perf_counter() - started, 1)
    return {"cache": str(folder), "dtype": key.dtype, **counts, "bytes": size, "seconds": seconds}


def dry_run(
    recipe: CachedRecipe, options: RunOptions, reporter: Reporter, dtype: Dtype | None = None
) -> dict[str, Any]:
    """What `run` would write: samples, and bytes for each; errors as in `run`."""
    recipe = with_precision(resolve_start(with_model_folders(recipe, reporter), reporter.warn), options)
    shards = open_shards(recipe.data.shards, recipe.data, reporter)
    folder = _folder(recipe, options, shards)
    key = _key_to_use(folder, Manifest.read(folder), cache_key(recipe), dtype, options.overwrite)
    size = bytes_per_sample(recipe, key)
    return {
        "cache": str(folder),
        "dtype": key.dtype,
        "samples": shards.num_samples,
        "mirrored_too": len(key.flips) > 1,
        "bytes_per_sample": size,
        "bytes_of_latents": size * shards.num_samples,
    }


def _folder(recipe: CachedRecipe, options: RunOptions, shards: ShardSet) -> Path:
    """Where the recipe says, else beside the shards."""
    return options.out or Path(recipe.cache or shards.paths[0].parent / "cache")


def _key_to_use(
    folder: Path, before: Manifest | None, wanted: CacheKey, dtype: Dtype | None, overwrite: bool
) -> CacheKey:
    """The key to write with: what an earlier cache of the same recipe has besides is kept."""
    if before is None or overwrite:
        return replace(wanted, dtype=dtype or "fp32")
    causes = differences(before.key, wanted)
    if dtype not in (None, before.key.dtype):
        causes.append(f"--dtype was {before.key.dtype} and is {dtype}")
    if causes:
        raise OutputError(
            f"'{folder}' holds another cache",
            "; ".join(causes),
            "choose another folder, or replace it with --overwrite",
        )
    return before.key


class _Precomputation:
    """One run of `ldm precompute` on a locked folder; the ranks share the files that are missing."""

    def __init__(
        self,
        recipe: CachedRecipe,
        folder: Path,
        shards: ShardSet,
        key: CacheKey,
        encoder: FrozenEncoder,
        stop: StopRequest,
        reporter: Reporter,
        failures: FailureJournal,
        ranks: Ranks,
    ) -> None:
        self._ranks = ranks
        self._failures, self._num_written = failures, 0
        self._work = "before the first file"
        self._data, self._folder, self._shards, self._key = recipe.data, folder, shards, key
        self._stop, self._reporter = stop, reporter
        self._encoder = CacheEncoder(encoder, recipe, key)
        self._device = next(next(iter(encoder.networks.values())).parameters()).device
        self._sample_bytes = bytes_per_sample(recipe, key)

    def run(self, before: Manifest | None, is_damaged: bool) -> dict[str, int]:
        """Write the missing files; `cache.json` names a file only when it exists. Files of another recipe are deleted,
        unless the manifest `is_damaged` and did not say that they are."""
        known, is_first = before.shards if before else (), self._ranks.is_first
        own, numbers = self._shards, range(len(self._shards.paths)) if is_first else ()
        shards = tuple(CachedShard.of(own.file(number), own.fingerprint_of(number), known) for number in numbers)
        if is_first and (before is None or before.key != self._key):
            write_manifest(self._folder, Manifest(self._key, shards))
        num_encoded = self._write_latents(shards)
        text_stems, num_captions = self._write_text()
        self._ranks.wait()
        removed = 0
        if is_first:
            shards = tuple(replace(s, file=file_of(self._folder, self._key.latents_stem(s.sha256))) for s in shards)
            manifest = Manifest(
                self._key, shards, tuple(file_of(self._folder, stem) for stem in text_stems), complete=True
            )
            write_manifest(self._folder, manifest)
            removed = 0 if is_damaged else remove_orphans(self._folder, manifest)
            self._failures.file.unlink(missing_ok=True)
        samples = self._shards.num_samples
        return {"samples": samples, "encoded": num_encoded, "captions": num_captions, "removed_files": removed}

    def _found_by_first(self, find: Callable[[], T]) -> T:
        """What rank 0 finds in the folder before any rank goes on to write there, as plain data."""
        found: T = json.loads(self._ranks.from_first(json.dumps(find() if self._ranks.is_first else None)))
        return found

    def _write_latents(self, shards: Sequence[CachedShard]) -> int:
        """Encode the pictures of the shards whose file is not there; how many samples those have."""
        stems = [self._key.latents_stem(shard.sha256) for shard in shards]
        find = partial(find_whole, self._folder, warn=self._reporter.warn)
        every = self._found_by_first(lambda: [(s, i) for i, s in enumerate(stems) if not find(s)])
        total = sum(self._shards.sizes[number] for _, number in every)
        expect_room(self._folder, total * self._sample_bytes, "the cache", ", choose another folder, or --dtype fp16")
        missing = dict(every[self._ranks.rank :: self._ranks.world_size])
        chunks = [
            (number, range(first, min(first + self._encoder.size, self._shards.sizes[number])))
            for number in missing.values()
            for first in range(0, self._shards.sizes[number], self._encoder.size)
        ]
        own = sum(self._shards.sizes[number] for number in missing.values())
        with (
            self._reporter.progress("encoding images", own, unit="image") as progress,
            closing(sent_to_device(Chunks(self._shards, self._data, chunks).ahead(), self._device)) as pictures,
            # In a thread of its own, so that the samples before are written meanwhile.
            prefetched(self._encoder.chunk(part) for part in pictures) as encoded,
        ):
            done = count()
            for number_done, (stem, number) in enumerate(missing.items()):
                self._work = f"at {number_done} of {len(missing)} files of pictures"
                self._write(stem, self._samples(number, encoded, lambda: progress.update(next(done) + 1)))
        return total

    def _write(self, stem: str, samples: Iterable[Mapping[str, Any]]) -> None:
        write_file(self._folder, stem, samples)
        self._num_written += 1

    def _samples(
        self, shard: int, encoded: Iterator[EncodedChunk], report: Callable[[], None]
    ) -> Iterator[dict[str, Any]]:
        """The samples of a latents file."""
        index = self._shards.indexes[shard]
        sample = 0
        while sample < index.num_samples:
            self._check_stop()
            chunk = next(encoded)
            files = iter(chunk.files)
            for number in range(sample, sample + chunk.size):
                key = index.key(number)
                if number in chunk.bad:
                    yield bad_members(key, *chunk.bad[number])
                else:
                    yield moments_members(key, next(files))
                report()
            sample += chunk.size

    def _write_text(self) -> tuple[list[str], int]:
        """Encode the captions that no file has yet; the stems of all files, and how many captions they hold."""
        if not self._key.text:
            return [], 0
        prefix = self._key.text_stem()
        self._work = "with all files of pictures, among the captions"
        files = self._found_by_first(lambda: find_whole(self._folder, prefix, self._reporter.warn))
        stems = [stem_of(Path(name)) for name in files]
        known = known_captions([self._folder / name for name in files], self._reporter)
        with self._reporter.progress("encoding captions", self._shards.num_samples, unit="sample") as progress:
            fresh = self._fresh_captions(known, progress)
            while captions := list(islice(fresh, _CAPTIONS_PER_FILE)):
                stems.append(next(stem for i in count() if (stem := f"{prefix}-{i:06d}") not in stems))
                if len(stems) % self._ranks.world_size == self._ranks.rank:
                    self._write(stems[-1], self._with_conditions(captions))
        return stems, len(known)

    def _fresh_captions(self, known: set[str], progress: Progress) -> Iterator[str]:
        """The empty caption and every caption of the shards, each if it is not in `known`, where it is put."""
        decoder = SampleDecoder(self._shards, self._data, Wanted(image=False, label=False))
        places = [(shard, sample) for shard, size in enumerate(self._shards.sizes) for sample in range(size)]
        for number in range(len(places) + 1):
            for caption in decoder.captions(*places[number - 1]) if number else [""]:
                digest = caption_digest(caption)
                if digest not in known:
                    known.add(digest)
                    yield caption
            progress.update(number)
        decoder.close()

    def _with_conditions(self, captions: list[str]) -> Iterator[dict[str, Any]]:
        """The samples of a text file."""
        for first in range(0, len(captions), self._encoder.size):
            self._check_stop()
            part = captions[first : first + self._encoder.size]
            for caption, condition in zip(part, self._encoder.conditions(part), strict=True):
                yield caption_members(caption, condition)

    def _check_stop(self) -> None:
        reason = self._stop.reason
        if reason is None:
            return
        remedy = "what is written stays: run the same command again to go on"
        if in_vain := reason == TIME_LIMIT and not self._num_written:
            remedy = "no file was finished in it: run the same command again, with more time"
        error = Preempted(f"stopped {self._work} for the cache in '{self._folder}'", reason, remedy)
        if in_vain and self._ranks.is_first:
            self._failures.add(1 + len(list(self._folder.glob("[!.]*.tar"))), str(error))
        raise error
