"""Shard indexes kept between runs, outside the data's folder: `$XDG_CACHE_HOME/ldm/index` or
`~/.cache/ldm/index`.

A cached index is used only if the shard's size and times are those of the file that was indexed. The system sets the
time of change (ctime) at every write; if that alone differs, as after `chmod` or a hard link, the fingerprint of the
contents decides. A stale index that passes these checks is still found, because every read verifies the header of the
member.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm_cli.data.fingerprint import fingerprint_of_contents
from ldm_cli.data.tar_index import ShardIndex
from ldm_cli.storage import user_cache

_VERSION = 3
_FACTS = ("file_size", "end", "extensions", "ignored", "contents", "sha256")
_ARRAYS = ("key_ends", "sample_starts", "members")


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
        described: dict[str, Any] = {name: facts[name] for name in _FACTS}
        described |= {name: array("q", _bytes_of(tensors[name])) for name in _ARRAYS}
        described |= {"keys": _bytes_of(tensors["keys"]), "extensions": tuple(facts["extensions"])}
        index = ShardIndex(**described)
        status = shard.stat()
        if facts["version"] != _VERSION or (status.st_size, status.st_mtime_ns) != (index.file_size, facts["mtime_ns"]):
            return None
        if status.st_ctime_ns != facts["ctime_ns"]:
            if fingerprint_of_contents(shard) != index.contents:
                return None
            with contextlib.suppress(OSError):  # else it is compared every time
                save_index(shard, index, folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return index


def save_index(shard: Path, index: ShardIndex, folder: Path) -> None:
    """Keep the index of an undamaged shard; errors as in `save_tensors`."""
    status = shard.stat()
    facts = {"version": _VERSION, "mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns}
    facts |= {name: getattr(index, name) for name in _FACTS}
    columns = {name: bytearray(getattr(index, name)) for name in ("keys", *_ARRAYS)}
    tensors = {name: torch.frombuffer(c, dtype=torch.uint8) if c else torch.empty(0) for name, c in columns.items()}
    save_tensors(_file(shard, folder), tensors, facts)


def load_tensors(file: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The tensors and facts of a file of `save_tensors`; None if there is none, or a damaged one."""
    if not file.is_file():  # a FIFO would be waited for
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata()
            sound = metadata["sha256"] == _digest(tensors, metadata["facts"])
            return (tensors, json.loads(metadata["facts"])) if sound else None
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
        text = json.dumps(facts)
        save_file(tensors, temporary, {"facts": text, "sha256": _digest(tensors, text)})
        temporary.replace(file)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _file(shard: Path, folder: Path) -> Path:
    name = hashlib.sha256(os.fsencode(os.path.realpath(shard))).hexdigest()[:32]
    return folder / f"{name}.safetensors"


def _bytes_of(tensor: Tensor) -> bytes:
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)


def _digest(tensors: Mapping[str, Tensor], facts: str) -> str:
    digest = hashlib.sha256(facts.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()
