"""WebDataset shards of samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ldm_cli.storage import whole_file


def write_shard(path: Path, samples: Iterable[Mapping[str, Any]]) -> int:
    """Write a shard of these samples, whole or not at all; errors as in `whole_file`, and of `samples`.

    Returns:
        How many there were.
    """
    from webdataset import TarWriter  # a slow import, needed here alone

    count = 0
    # Fixed owner, mode and time: the same content is the same bytes.
    owner = {"user": "ldm", "group": "ldm", "mode": 0o644, "mtime": 0}
    with whole_file(path) as partial, partial.open("wb") as stream, TarWriter(stream, encoder=False, **owner) as tar:
        for sample in samples:
            tar.write(sample)
            count += 1
    return count
