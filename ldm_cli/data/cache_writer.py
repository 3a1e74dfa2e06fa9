"""Writing the files of a latent cache: each whole or not at all, one process at a time."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ldm_cli.data.cache_manifest import MANIFEST, Manifest, is_whole, whole_name
from ldm_cli.data.latent_cache import BAD, CONDITION, MOMENTS, caption_digest
from ldm_cli.data.shard_writer import write_shard
from ldm_cli.errors import DataError, OutputError
from ldm_cli.storage import TEMPORARY_PREFIX, open_output, storage_errors, write_whole


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Own the folder of a cache: it is created where needed, and half-written files of a killed owner are deleted.

    Raises:
        OutputError: it cannot be made, or another process is writing there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.fdopen(open_output(folder / ".lock", os.O_RDWR), "r+b")
    except OSError as error:
        raise OutputError(f"cannot write a cache into '{folder}'", error.strerror or str(error)) from error
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(f"'{folder}' is in use", "by another `ldm precompute`", "wait for it") from error
        for partial in folder.glob(f"{TEMPORARY_PREFIX}*"):
            partial.unlink(missing_ok=True)
        yield


def moments_files(moments: Mapping[str, Tensor]) -> list[bytes]:
    """A safetensors file for each of n samples, of row i of each tensor [n, …].

    Rows of one shape have one header, and their bytes in its order: a twentieth of the time of making each by itself.
    """
    if not moments:
        return []
    template = save({name: tensor[0].contiguous() for name, tensor in moments.items()})
    size = 8 + int.from_bytes(template[:8], "little")
    header: dict[str, Any] = json.loads(template[8:size])
    names = sorted(moments, key=lambda name: header[name]["data_offsets"])
    rows = torch.cat([moments[name].flatten(1).contiguous().view(torch.uint8) for name in names], dim=1)
    return [template[:size] + row.tobytes() for row in rows.numpy()]


def moments_members(key: str, file: bytes) -> dict[str, Any]:
    """A sample of a latents file, of one of `moments_files`."""
    return {"__key__": key, MOMENTS: file}


def bad_members(key: str, reason: str, detail: str) -> dict[str, Any]:
    """A sample whose picture cannot be used, and why: the attributes of `BadSampleError`."""
    return {"__key__": key, BAD: json.dumps({"reason": reason, "detail": detail}).encode()}


def caption_members(caption: str, condition: Mapping[str, Tensor]) -> dict[str, Any]:
    """A sample of a text file: a caption and the fields of its condition."""
    text = caption.encode("utf-8", "backslashreplace")
    content = save({name: tensor.contiguous() for name, tensor in condition.items()})
    return {"__key__": caption_digest(caption), CONDITION: content, "txt": text}


def write_file(folder: Path, stem: str, samples: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of samples, named by `stem` and its content; errors as of `write_shard`."""
    partial = folder / f"{TEMPORARY_PREFIX}{stem}.tar"
    write_shard(partial, samples)
    with storage_errors(partial):
        partial.replace(folder / whole_name(stem, partial))


def find_whole(folder: Path, stem: str, warn: Callable[[str], None]) -> list[str]:
    """Names of the files of a cache whose names begin so, sorted; damaged ones are deleted with a warning."""
    found = []
    for path in sorted(folder.glob(f"{stem}-*.tar")):
        if is_whole(path):
            found.append(path.name)
        else:
            warn(f"'{path}' is damaged: its content is not that of its name; it is made again")
            path.unlink()
    return found


def file_of(folder: Path, stem: str) -> str:
    """The name of the file with this stem."""
    return min(folder.glob(f"{stem}-*.tar")).name


def manifest_to_update(folder: Path, warn: Callable[[str], None]) -> tuple[Manifest | None, bool]:
    """The manifest of a cache, and whether there is one that cannot be used: it is then made anew from the files that
    are whole."""
    try:
        return Manifest.read(folder), False
    except DataError as error:
        warn(f"{error.what}: {error.cause}; it is made again")
        return None, True


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace cache.json as a whole; errors as in `whole_file`."""
    write_whole(folder / MANIFEST, manifest.to_json())


def remove_orphans(folder: Path, manifest: Manifest) -> int:
    """Delete the files of a cache that its manifest no longer names; how many there were."""
    named = {shard.file for shard in manifest.shards} | set(manifest.text_files)
    orphans = [p for kind in ("latents", "text") for p in folder.glob(f"{kind}-*.tar") if p.name not in named]
    for orphan in orphans:
        orphan.unlink(missing_ok=True)
    return len(orphans)
