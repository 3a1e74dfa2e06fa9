"""Shard indexes kept between runs, outside the data's folder: `$XDG_CACHE_HOME/ldm/index` or
`~/.cache/ldm/index`.

A cached index is used only if the shard's size and modification time match, a sample of its headers is unchanged and
its end-of-archive blocks are in place. A stale index that passes these checks is still found, because every read
verifies the header of the member.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm_cli.data.tar_format import BLOCK
from ldm_cli.data.tar_index import ShardIndex
from ldm_cli.storage import user_cache

_VERSION = 2
_NUM_PROBES = 16
_FACTS = ("file_size", "end", "extensions", "ignored")
_TENSORS = ("key_bytes", "key_ends", "sample_starts", "members")


def cache_folder() -> Path:
    """Where indexes are kept."""
    return user_cache() / "index"


def load_index(shard: Path, folder: Path) -> ShardIndex | None:
    """The cached index of `shard`, or None if there is none that fits it."""
    found = load_tensors(_file(shard, folder))
    if found is None:
        return None
    tensors, facts = found
    try:
        described = {**tensors, **{name: facts[name] for name in _FACTS}, "extensions": tuple(facts["extensions"])}
        index = ShardIndex(**described)
        fits = (
            facts["version"] == _VERSION
            and facts["mtime_ns"] == shard.stat().st_mtime_ns
            and facts["fingerprint"] == index.fingerprint()
            and _describes(index, shard)
        )
    except (OSError, KeyError, TypeError):
        return None
    return index if fits else None


def save_index(shard: Path, index: ShardIndex, folder: Path) -> None:
    """Keep the index of an undamaged shard; errors as in `save_tensors`."""
    facts = {"version": _VERSION, "mtime_ns": shard.stat().st_mtime_ns, "fingerprint": index.fingerprint()}
    facts |= {name: getattr(index, name) for name in _FACTS}
    save_tensors(_file(shard, folder), {name: getattr(index, name) for name in _TENSORS}, facts)


def load_tensors(file: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The tensors and facts of a file of `save_tensors`; None if there is none, or a damaged one."""
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            return tensors, json.loads(opened.metadata()["facts"])
    except (OSError, RuntimeError, SafetensorError, ValueError, KeyError, TypeError):  # torch opens it, too
        return None


def save_tensors(file: Path, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Replace a file of the cache; other processes see the old file or the new one, never a part.

    Raises:
        OSError: the folder cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".tmp-{os.getpid()}")
    try:
        save_file(tensors, temporary, {"facts": json.dumps(facts)})
        temporary.replace(file)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _file(shard: Path, folder: Path) -> Path:
    name = hashlib.sha256(os.fsencode(os.path.realpath(shard))).hexdigest()[:32]
    return folder / f"{name}.safetensors"


def _describes(index: ShardIndex, shard: Path) -> bool:
    """Whether the shard's size, end blocks and a sample of its headers are those of the index."""
    num_members = len(index.members)
    picks = torch.linspace(0, max(num_members - 1, 0), min(_NUM_PROBES, num_members)).long()
    with shard.open("rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size != index.file_size:
            return False
        for _, offset, _, header_crc in index.members[picks].tolist():
            if zlib.crc32(os.pread(file.fileno(), BLOCK, offset - BLOCK)) != header_crc:
                return False
        return os.pread(file.fileno(), 2 * BLOCK, index.end) == bytes(2 * BLOCK)
