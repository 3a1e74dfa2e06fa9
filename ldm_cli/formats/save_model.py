"""Write a model folder in the Hugging Face layout."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ldm_cli.formats.json_file import write_json
from ldm_cli.formats.weight_files import CONFIG_NAME, DIFFUSERS_WEIGHTS, shard_names, write_tensors
from ldm_cli.storage import storage_errors

# What DDP, compile and FSDP put into parameter names.
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module"})


def save_model(
    folder: Path,
    state_dict: Mapping[str, Tensor],
    config: Mapping[str, Any],
    weights_name: str = DIFFUSERS_WEIGHTS,
    frozen: Collection[str] = (),
) -> None:
    """Write config.json and float32 weights, each file whole or not at all, with the mode the umask says.

    Args:
        folder: is created where needed.
        state_dict: name → tensor, on any device; prefixes of wrappers (DDP, compile, FSDP) are taken off.
        config: content of config.json.
        weights_name: `DIFFUSERS_WEIGHTS` or `TRANSFORMERS_WEIGHTS`.
        frozen: tensors that `save_frozen` has written as the first of two shards: the others become the second.

    Raises:
        OutputError, StorageError: writing failed.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG_NAME, config)
    tensors = {_unwrapped(name): _for_file(tensor) for name, tensor in state_dict.items()}
    if not frozen:
        write_tensors(folder / weights_name, tensors)
        return
    first, second = shard_names(weights_name, 2)
    write_tensors(folder / second, {name: tensor for name, tensor in tensors.items() if name not in frozen})
    _write_index(folder, tensors, weights_name, {name: first if name in frozen else second for name in tensors})


def save_sharded(
    folder: Path,
    tensors: Mapping[str, Tensor],
    weights_name: str = DIFFUSERS_WEIGHTS,
    metadata: Mapping[str, str] = MappingProxyType({}),
    shard_bytes: int | None = None,
) -> None:
    """Write the tensors of a model folder in the types that they have.

    Args:
        folder: exists.
        tensors: by name.
        weights_name: as in `save_model`.
        metadata: of each file.
        shard_bytes: most bytes of tensors in a file, or one larger tensor; None: one file for all.

    Raises:
        OutputError, StorageError: writing failed.
    """
    shards: list[dict[str, Tensor]] = [{}]
    room = math.inf if shard_bytes is None else shard_bytes
    left = room
    for name, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > left:
            shards.append({})
            left = room
        shards[-1][name] = tensor
        left -= tensor.nbytes
    if len(shards) == 1:
        write_tensors(folder / weights_name, tensors, metadata)
        return
    names = shard_names(weights_name, len(shards))
    for file, shard in zip(names, shards, strict=True):
        write_tensors(folder / file, shard, metadata)
    files = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    _write_index(folder, tensors, weights_name, files)


def _write_index(folder: Path, tensors: Mapping[str, Tensor], weights_name: str, weight_map: Mapping[str, str]) -> None:
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / f"{weights_name}.index.json", index)


def save_frozen(
    folder: Path, state_dict: Mapping[str, Tensor], frozen: Collection[str], weights_name: str = DIFFUSERS_WEIGHTS
) -> None:
    """Write the first of two shards of a model: the tensors that training leaves alone; arguments as in `save_model`.

    Raises:
        OutputError, StorageError: writing failed.
    """
    if frozen:
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        first, _ = shard_names(weights_name, 2)
        write_tensors(folder / first, {name: _for_file(state_dict[name]) for name in frozen})


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _for_file(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
