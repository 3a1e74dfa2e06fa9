"""Tables of shards kept between runs, outside the data's folder: `$XDG_CACHE_HOME/ldm/index` or `~/.cache/ldm/index`.

A table is used only if the shard's size and times are those of the file that was indexed. The system sets the time of
change (ctime) at every write; if that alone differs, as after `chmod` or a hard link, the fingerprint of the contents
decides. A stale table that passes these checks is still found, because every read verifies the header of the member.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any, Literal

from ldm_cli.data.columns import read_columns, read_facts, write_columns
from ldm_cli.data.fingerprint import fingerprint_of_contents
from ldm_cli.data.tar_index import ShardIndex
from ldm_cli.errors import InputNotFoundError
from ldm_cli.storage import user_cache

_VERSION = 4
_FACTS = ("file_size", "end", "ignored", "contents", "sha256")
_COLUMNS: dict[str, Literal["B", "I"]] = {"keys": "B", "key_ends": "I", "sample_starts": "I", "members": "I"}

Stamp = tuple[int, int, int]
"""Size, time of modification and time of change of a local shard, in bytes and ns; two hashes of what its server says
in place of the times of a remote one."""


def cache_folder() -> Path:
    """Where tables are kept."""
    return user_cache() / "index"


def table_file(name: str, folder: Path | None = None) -> Path:
    """The file with the table of the shard of this name: an absolute path, or an address without credentials."""
    return (folder or cache_folder()) / f"{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}.safetensors"


def stamp_of(shard: Path) -> Stamp:
    """The stamp of a local shard.

    Raises:
        InputNotFoundError: there is none.
    """
    try:
        return stamp_from(os.stat(shard))  # noqa: PTH116
    except OSError as error:
        raise InputNotFoundError(f"cannot open shard '{shard}'", os.strerror(error.errno or 0)) from error


def stamp_from(status: os.stat_result) -> Stamp:
    """The stamp in the status of a local shard."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def described(file: Path, stamp: Stamp, shard: Path | None) -> dict[str, Any] | None:
    """The facts of a table that fits a shard with that stamp, without reading the table; else None.

    Args:
        stamp: of the shard.
        shard: the file of a local shard.
    """
    facts = read_facts(file)
    if facts is None or facts.get("version") != _VERSION or facts["stamp"][:2] != [*stamp[:2]]:
        return None
    if facts["stamp"][2] != stamp[2]:
        if shard is None or fingerprint_of_contents(shard) != facts["contents"]:
            return None
        with contextlib.suppress(OSError):  # else it is compared every time
            if (index := load_table(file)) is not None:
                save_table(file, index, stamp)
    return facts


def load_table(file: Path) -> ShardIndex | None:
    """The index of a shard, mapped into memory; None if there is none, or a damaged one."""
    found = read_columns(file)
    if found is None or found[1].get("version") != _VERSION:
        return None
    columns, facts = found
    known: dict[str, Any] = {name: facts[name] for name in _FACTS} | {"extensions": tuple(facts["extensions"])}
    known |= {name: columns[name].cast(kind) for name, kind in _COLUMNS.items()}
    return ShardIndex(**known)


def save_table(file: Path, index: ShardIndex, stamp: Stamp) -> None:
    """Keep the index of an undamaged shard; errors as in `write_columns`."""
    facts = {name: getattr(index, name) for name in (*_FACTS, "extensions")}
    facts |= {
        "version": _VERSION,
        "stamp": stamp,
        "num_samples": index.num_samples,
        "members": index.extension_counts(),
    }
    write_columns(file, {name: getattr(index, name) for name in _COLUMNS}, facts)


def forget_table(file: Path) -> None:
    """Let the next start index a shard again."""
    with contextlib.suppress(OSError):
        file.unlink()
