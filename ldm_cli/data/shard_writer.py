"""WebDataset shards of samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

from ldm_cli.storage import whole_file


@contextmanager
def open_shard(path: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that adds a sample to a shard, which appears whole or not at all; errors as in `whole_file`."""
    from webdataset import TarWriter  # a slow import, needed here alone

    # Fixed owner, mode and time: the same content is the same bytes.
    owner = {"user": "ldm", "group": "ldm", "mode": 0o644, "mtime": 0}
    with whole_file(path) as partial, partial.open("wb") as stream, TarWriter(stream, encoder=False, **owner) as tar:
        yield tar.write


def write_shard(path: Path, samples: Iterable[Mapping[str, Any]]) -> int:
    """Write a shard of these samples; errors as in `open_shard`, and of `samples`.

    Returns:
        How many there were.
    """
    count = 0
    with open_shard(path) as add:
        for sample in samples:
            add(sample)
            count += 1
    return count


class ShardSeries:
    """Context for shards `PREFIX000000.tar`, …, filled one after the other; samples are numbered as their keys.

    Args:
        folder, prefix: where.
        shard_samples: samples of each shard but the last.
    """

    def __init__(self, folder: Path, prefix: str, shard_samples: int) -> None:
        self._folder, self._prefix, self._shard_samples = folder, prefix, shard_samples
        self._open, self.num_samples = ExitStack(), 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def add(self, members: Mapping[str, bytes]) -> None:
        """Add a sample; errors as in `open_shard`."""
        if self.num_samples % self._shard_samples == 0:
            self._open.close()
            self._add = self._open.enter_context(open_shard(self._folder / self._name(self.num_samples)))
        self._add({"__key__": f"{self.num_samples:09d}", **members})
        self.num_samples += 1

    def shards(self) -> dict[str, int]:
        """Name of each shard, and how many samples it has."""
        starts = range(0, self.num_samples, self._shard_samples)
        return {self._name(start): min(self._shard_samples, self.num_samples - start) for start in starts}

    def _name(self, number: int) -> str:
        return f"{self._prefix}{number // self._shard_samples:06d}.tar"
