"""Index the shards of a data set that are new or have changed, in one process or in several."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ldm_cli.data.fingerprint import fingerprint_of_contents
from ldm_cli.data.index_cache import described, load_table, save_table, table_file
from ldm_cli.data.known_counts import known_count
from ldm_cli.data.prefetch import made_ahead
from ldm_cli.data.shard_facts import ShardFact, ShardFacts, read_shard_facts, write_shard_facts
from ldm_cli.data.shard_paths import ShardPaths
from ldm_cli.data.shards import ShardSet, ShardTables
from ldm_cli.data.staging import StagingArea, forget_fetched
from ldm_cli.data.tar_index import ShardIndex, index_tar
from ldm_cli.errors import DataError
from ldm_cli.reporting import Reporter
from ldm_cli.storage import file_sha256

_MAX_ASKED = 1024
"""Remote shards up to which their server is asked for each at the start; of more, for each when it is fetched."""
_QUESTIONS = 16
"""Questions to a server at the same time."""


@dataclass(frozen=True)
class Indexing:
    """How shards are indexed.

    Attributes:
        on_bad_shard: `skip` takes the whole samples before a damage; `stop` raises.
        hashed: read every shard as a whole, unless its hash is kept with its table.
        needs_tables: index also shards whose count a file beside them gives.
        num_workers: processes that share the work; 0: this one.
        timeout: seconds without an answer of a worker after which it counts as hanging.
    """

    on_bad_shard: Literal["stop", "skip"] = "stop"
    hashed: bool = False
    needs_tables: bool = True
    num_workers: int = 0
    timeout: float = 300.0


class ShardIndexing:
    """Finds out the facts of shards, and makes their tables.

    Args:
        stamps: of local shards, three numbers each; those of remote ones are asked for.
        reporter: receives warnings about damaged shards and about a cache that cannot be written.
    """

    def __init__(
        self,
        paths: ShardPaths,
        stamps: array[int],
        how: Indexing,
        reporter: Reporter,
        staging: StagingArea | None = None,
    ) -> None:
        self._paths, self._stamps, self._how, self._reporter, self._staging = paths, stamps, how, reporter, staging
        self._is_kept = True

    def open(self) -> ShardSet:
        """The set, by the facts that are kept of it, or by those of its tables and of new indexes.

        Raises:
            DataError, InputNotFoundError, StorageError: as in `index_tar`, or of a server.
        """
        kept, how = self._kept(), self._how
        if kept and (kept.hashes or not how.hashed) and (kept.is_indexed or not how.needs_tables):
            return self._set(kept, {})
        held: dict[int, ShardIndex] = {}
        facts = ShardFacts.of(self._examined(range(len(self._paths)), held))
        if not held:
            with suppress(OSError):
                write_shard_facts(self._paths, facts)
        return self._set(facts, held)

    def _set(self, facts: ShardFacts, held: dict[int, ShardIndex]) -> ShardSet:
        tables = ShardTables(self._paths, facts, held, self._staging)
        return ShardSet(self._paths, facts, tables, staging=self._staging)

    def make_tables(self, shards: Sequence[int]) -> None:
        """Index these shards, unless their tables fit; errors as in `open`."""
        self._kept()
        for _ in self._examined(shards, {}):
            pass

    def _kept(self) -> ShardFacts | None:
        """The facts that are kept, if they are those of the shards as they are now."""
        remote = [shard for shard in range(len(self._paths)) if self._paths.address(shard)]
        if not remote or self._staging is None:
            return read_shard_facts(self._paths, self._stamps)
        if len(remote) > _MAX_ASKED and (kept := read_shard_facts(self._paths, None)):
            return kept
        addresses = [self._paths.name(shard) for shard in remote]
        with ThreadPoolExecutor(_QUESTIONS) as threads:
            first = self._staging.stamp(addresses[0])  # alone: if there is no answer, it is asked for with patience
            for shard, stamp in zip(remote, (first, *threads.map(self._staging.stamp, addresses[1:])), strict=True):
                self._stamps[3 * shard : 3 * shard + 3] = array("q", stamp)
        return read_shard_facts(self._paths, self._stamps)

    def _examined(self, shards: Sequence[int], held: dict[int, ShardIndex]) -> Iterator[ShardFact]:
        """The facts of these shards, in order; indexes that no file keeps are put into `held`."""
        how = self._how
        if how.num_workers:
            made = made_ahead(self._examine, shards, num_workers=how.num_workers, timeout=how.timeout)
        else:
            made = (self._examine(shard) for shard in shards)
        with closing(made), self._reporter.progress("indexing shards", total=len(shards), unit="shard") as progress:
            for done, (shard, fact) in enumerate(zip(shards, made, strict=True), start=1):
                if fact.held is not None:
                    held[shard] = fact.held
                self._warn(shard, fact)
                yield fact
                progress.update(done)

    def _warn(self, shard: int, fact: ShardFact) -> None:
        if fact.held and fact.held.damage:
            self._reporter.warn(
                f"shard '{self._paths[shard]}' is damaged ({fact.held.damage}): using {fact.num_samples} whole samples"
            )
        if fact.problem and self._is_kept:
            self._is_kept = False
            self._reporter.warn(f"cannot keep shard indexes: {fact.problem}; every run builds them again")

    def _examine(self, shard: int) -> ShardFact:
        """The facts of a shard, by its table, by a file beside it, or by indexing it; runs in the workers."""
        first, second, third = self._stamps[3 * shard : 3 * shard + 3]
        stamp, file, address = (first, second, third), table_file(self._paths.key(shard)), self._paths.address(shard)
        known = described(file, stamp, None if address else self._paths[shard])
        if known is not None and (known["sha256"] or not self._how.hashed):
            names = ("num_samples", "contents", "sha256", "ignored", "members")
            facts = {name: known[name] for name in names}
            return ShardFact(stamp=stamp, **facts)
        path = self._staging.fetch(address, stamp) if address and self._staging else self._paths[shard]
        count = None if address or self._how.needs_tables else known_count(path)
        if count is not None:
            return ShardFact(count, stamp, fingerprint_of_contents(path), is_indexed=False)
        index = load_table(file) if known is not None else None
        try:
            index = index or index_tar(path, self._how.on_bad_shard)
        except DataError:
            forget_fetched(path)
            raise
        if self._how.hashed:
            index = replace(index, sha256=file_sha256(path))
        if address and self._staging:
            self._staging.release(path)
        return self._fact(index, file, path, (first, second, third))

    def _fact(self, index: ShardIndex, file: Path, path: Path, stamp: tuple[int, int, int]) -> ShardFact:
        """The facts of a new index, which is kept unless the shard is damaged."""
        fact = ShardFact(
            index.num_samples, stamp, index.contents, index.sha256, index.ignored, index.extension_counts()
        )
        if index.damage:
            forget_fetched(path)
            return replace(fact, held=index)
        try:
            save_table(file, index, stamp)
        except OSError as error:
            return replace(fact, held=index, problem=str(error))
        return fact
