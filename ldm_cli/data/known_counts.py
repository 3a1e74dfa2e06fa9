"""How many samples a shard has, as the files beside it say, before it is indexed."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any


def known_count(shard: Path) -> int | None:
    """The number of samples by `NAME.idx`, `NAME_stats.json` or `sizes.json`; None where no file says it.

    The first is the index of NVIDIA's DALI (`wds2idx`), whose first line is `v1.2 COUNT`; the second is written by
    img2dataset, where `successes` are the pictures; the third is that of `ldm data index --sizes`.
    """
    count = _first_line_of(shard.with_suffix(".idx"))
    if count is None:
        count = _content(shard.with_name(f"{shard.stem}_stats.json")).get("successes")
    if count is None:
        count = _sizes(shard.parent).get(shard.name)
    return count if isinstance(count, int) and not isinstance(count, bool) and count >= 0 else None


def _first_line_of(file: Path) -> int | None:
    try:
        with file.open("rb") as opened:
            words = opened.readline(64).split()
    except OSError:
        return None
    return int(words[1]) if len(words) == 2 and words[0].startswith(b"v") and words[1].isdigit() else None


@lru_cache(maxsize=4)
def _sizes(folder: Path) -> dict[str, Any]:
    return _content(folder / "sizes.json")


def _content(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
