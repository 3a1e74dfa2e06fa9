"""Open the shards of a data set: find, index, and choose samples."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Literal

from ldm_cli.data.config import DataConfig
from ldm_cli.data.index_cache import cache_folder, load_index, save_index
from ldm_cli.data.patterns import find_sources
from ldm_cli.data.remote import StagingArea, forget_fetched
from ldm_cli.data.sample_filter import choose_samples
from ldm_cli.data.shards import ShardSet
from ldm_cli.data.tar_index import ShardIndex, index_tar
from ldm_cli.errors import DataError, InputNotFoundError, RecipeError
from ldm_cli.reporting import Reporter
from ldm_cli.storage import file_sha256


class NoSamplesError(InputNotFoundError):
    """Shards can be read and hold no whole sample."""


def open_shards(
    shards: str | tuple[str, ...], config: DataConfig, reporter: Reporter, hashed: bool = False
) -> ShardSet:
    """Find and index shards, and choose samples by `config.filter` and `config.quarantine`.

    Without these two, only headers are read.

    Args:
        shards: a path, glob, folder or brace pattern, or several; usually `config.shards` or
            `config.val_shards`.
        config: how to treat damage, and which samples to choose.
        reporter: receives warnings about damaged shards and about a cache that cannot be written.
        hashed: read every shard as a whole, unless its hash is kept with its index.

    Raises:
        InputNotFoundError: shards are missing, empty or unreadable (all of them are listed), or hold no
            samples; or none are chosen, or no training sample has a mask where `config` names one.
        DataError: a shard is damaged and `on_bad_shard` is `stop`.
        UnavailableError: a remote source is named that is not allowed, or whose back end is missing.
        StorageError: reading failed.
        RecipeError: `shards` are to be streamed.
    """
    if config.stream and shards == config.shards:
        raise RecipeError(
            "data.stream=true is for training only", "this needs indexed shards", "name shards that can be indexed"
        )
    staging = StagingArea(config.max_fetched_bytes, reporter)
    found = find_sources(shards, config.remote_schemes, staging.fetch)
    ends = (0, *itertools.accumulate(map(len, found)))
    result = replace(
        index_shards(tuple(itertools.chain.from_iterable(found)), config.on_bad_shard, reporter, hashed),
        sources=tuple(itertools.starmap(range, itertools.pairwise(ends))),
        staging=staging,
    )
    if not result.num_samples:
        raise NoSamplesError(f"there are no samples in {len(result.paths)} shards", f"first one: '{result.paths[0]}'")
    if config.mask and shards == config.shards and all(config.mask not in index.extensions for index in result.indexes):
        raise InputNotFoundError(f"no sample of data.shards has a mask '.{config.mask}'", remedy="correct data.mask")
    if config.filter or config.aspect_buckets or config.quarantine:
        result = choose_samples(result, config, reporter)
    if result.ignored:
        counts = ", ".join(f"{count} × {reason}" for reason, count in result.ignored.items())
        reporter.info(f"ignored members of shards: {counts}")
    return result


def index_shards(
    paths: tuple[Path, ...], on_bad_shard: Literal["stop", "skip"], reporter: Reporter, hashed: bool = False
) -> ShardSet:
    """Index these files, which may hold no samples; arguments and errors are those of `open_shards`."""
    folder: Path | None = cache_folder()
    indexes: list[ShardIndex] = []
    with reporter.progress("indexing shards", total=len(paths), unit="shard") as progress:
        for number, path in enumerate(paths, start=1):
            known = load_index(path, folder) if folder else None
            index = known or _indexed(path, on_bad_shard, reporter)
            if hashed and index.sha256 is None:
                index = replace(index, sha256=file_sha256(path))
            if index is not known and not index.damage and folder:
                folder = _keep(path, index, folder, reporter)
            indexes.append(index)
            progress.update(number)
    return ShardSet(paths, tuple(indexes))


def _indexed(path: Path, on_bad_shard: Literal["stop", "skip"], reporter: Reporter) -> ShardIndex:
    """A fresh index. A fetched shard that is damaged is fetched again by the next start."""
    try:
        index = index_tar(path, on_bad_shard)
    except DataError:
        forget_fetched(path)
        raise
    if index.damage:
        forget_fetched(path)
        reporter.warn(f"shard '{path}' is damaged ({index.damage}): using {index.num_samples} whole samples")
    return index


def _keep(path: Path, index: ShardIndex, folder: Path, reporter: Reporter) -> Path | None:
    """Cache the index. If that fails, warn once and return None: no cache any more."""
    try:
        save_index(path, index, folder)
    except OSError as error:
        reporter.warn(f"cannot keep shard indexes in '{folder}': {error}; every run builds them again")
        return None
    return folder
