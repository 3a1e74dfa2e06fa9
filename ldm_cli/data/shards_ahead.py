"""Remote shards that are fetched before their samples are needed, and released after their last one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from ldm_cli.data.shards import ShardSet
from ldm_cli.data.step_plan import Turn


class ShardsAhead:
    """Follows the windows that steps take their samples of. It changes when a shard is fetched, never a batch.

    Args:
        keep: closes the files of all shards but these.
    """

    def __init__(self, shards: ShardSet, keep: Callable[[Collection[int]], None]) -> None:
        self._shards, self._keep = shards, keep
        self._is_remote = any(shards.paths.address(shard) for shard in range(len(shards.paths)))
        self._windows: dict[int, list[int]] = {}

    def look(self, turns: Sequence[Turn]) -> None:
        """Fetch the windows of these turns and the next ones in threads; release those that came before."""
        if not self._is_remote:
            return
        new: list[int] = []
        for turn in turns:
            now, following = turn.part.windows(turn.number)
            if self._windows.get(id(turn.part)) != now:
                self._windows[id(turn.part)] = now
                new += [*now, *following]
        staging = self._shards.staging
        if new and staging is not None:
            self._keep({shard for window in self._windows.values() for shard in window})
            wanted = [(self._shards.paths.address(shard), self._shards.facts.stamp_of(shard)) for shard in new]
            staging.fetch_ahead([(address, stamp) for address, stamp in wanted if address])
