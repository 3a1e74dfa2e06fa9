"""The names of a data set's shards in a few bytes each."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from pathlib import Path

from ldm_cli.data.remote import name_of


class ShardPaths:
    """The shards of a data set, in a fixed order.

    Args:
        names: paths, or addresses of remote shards.
        place: where the local copy of a remote shard is, once it is fetched; None: all are local.
    """

    def __init__(self, names: Iterable[str], place: Callable[[str], Path] | None = None) -> None:
        encoded = [os.fsencode(name) for name in names]
        self.text = b"".join(encoded)
        self._ends = array("q", accumulate(map(len, encoded), initial=0))
        self._place = place

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, shard: int) -> Path:
        """The local file of a shard, also one that is not fetched yet."""
        name = self.name(shard)
        return self._place(name) if self._place and "://" in name else Path(name)

    def __iter__(self) -> Iterator[Path]:
        return map(self.__getitem__, range(len(self)))

    def name(self, shard: int) -> str:
        """Path or address of a shard, as it was found."""
        if not -len(self) <= shard < len(self):
            raise IndexError(f"ShardPaths: shard={shard} of {len(self)}")
        shard %= len(self)
        return os.fsdecode(self.text[self._ends[shard] : self._ends[shard + 1]])

    def key(self, shard: int) -> str:
        """What names a shard in the cache: its absolute path, or its address without user and password."""
        name = self.name(shard)
        return name_of(name) if self.address(shard) else os.path.abspath(name)  # noqa: PTH100

    def address(self, shard: int) -> str | None:
        """The address of a remote shard; None for a local one."""
        name = self.name(shard)
        return name if self._place and "://" in name else None
