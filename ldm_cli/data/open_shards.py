"""Open the shards of a data set: find them, index those that are new or have changed, and choose samples."""

from __future__ import annotations

from array import array
from dataclasses import replace
from pathlib import Path
from typing import Literal

from ldm_cli.data.config import DataConfig
from ldm_cli.data.index_cache import stamp_of
from ldm_cli.data.indexing import Indexing, ShardIndexing
from ldm_cli.data.patterns import Found, find_sources
from ldm_cli.data.sample_filter import choose_samples
from ldm_cli.data.shard_paths import ShardPaths
from ldm_cli.data.shards import ShardSet
from ldm_cli.data.staging import StagingArea, place_of
from ldm_cli.errors import InputNotFoundError, RecipeError
from ldm_cli.reporting import Reporter


class NoSamplesError(InputNotFoundError):
    """Shards can be read and hold no whole sample."""


def open_shards(
    shards: str | tuple[str, ...],
    config: DataConfig,
    reporter: Reporter,
    hashed: bool = False,
    needs_tables: bool = False,
) -> ShardSet:
    """Find and index shards, and choose samples by `config.filter` and `config.quarantine`.

    Without these two, only headers are read, and of a data set that has not changed since it was opened before, a file
    of a few numbers a shard.

    Args:
        shards: a path, glob, folder or brace pattern, or several; usually `config.shards` or
            `config.val_shards`.
        config: how to treat damage, and which samples to choose.
        reporter: receives warnings about damaged shards and about a cache that cannot be written.
        hashed, needs_tables: as in `Indexing`.

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
    found = find_sources(shards, config.remote_schemes)
    result = replace(_indexing(found, config, reporter, hashed, needs_tables).open(), sources=found.sources)
    del found  # names of half a million shards
    if not result.num_samples:
        raise NoSamplesError(f"there are no samples in {len(result.paths)} shards", f"first one: '{result.paths[0]}'")
    facts = result.facts
    if config.mask and shards == config.shards and facts.is_indexed and config.mask not in facts.members:
        raise InputNotFoundError(f"no sample of data.shards has a mask '.{config.mask}'", remedy="correct data.mask")
    if config.filter or config.aspect_buckets or config.quarantine:
        result = choose_samples(result, config, reporter)
    if result.ignored:
        counts = ", ".join(f"{count} × {reason}" for reason, count in result.ignored.items())
        reporter.info(f"ignored members of shards: {counts}")
    return result


def make_tables(config: DataConfig, reporter: Reporter, hashed: bool, rank: int, world_size: int) -> None:
    """Index every `world_size`-th shard of `config.shards`, from number `rank` on; errors as in `open_shards`."""
    found = find_sources(config.shards, config.remote_schemes)
    indexing = _indexing(found, config, reporter, hashed, needs_tables=True)
    indexing.make_tables(range(rank, len(found.names), world_size))


def index_shards(paths: tuple[Path, ...], on_bad_shard: Literal["stop", "skip"], reporter: Reporter) -> ShardSet:
    """Index these files, which may hold no samples; arguments and errors are those of `open_shards`."""
    stamps = array("q", [number for path in paths for number in stamp_of(path)])
    return ShardIndexing(ShardPaths(map(str, paths)), stamps, Indexing(on_bad_shard), reporter).open()


def _indexing(found: Found, config: DataConfig, reporter: Reporter, hashed: bool, needs_tables: bool) -> ShardIndexing:
    how = Indexing(config.on_bad_shard, hashed, needs_tables, config.num_workers, config.worker_timeout)
    staging = StagingArea(config.max_fetched_bytes, reporter)
    return ShardIndexing(ShardPaths(found.names, place_of), found.stamps, how, reporter, staging)


def in_both(training: ShardSet, held_out: ShardSet) -> str | None:
    """A warning if `training` holds shards of `held_out`, as a folder with both does; None otherwise."""
    trained = {training.paths.key(shard) for shard in range(len(training.paths))}
    both = [held_out.paths.name(shard) for shard in range(len(held_out.paths)) if held_out.paths.key(shard) in trained]
    if not both:
        return None
    return f"data.shards holds {len(both)} of data.val_shards, such as '{both[0]}': validation sees what was trained on"
