"""Write a model folder in the Hugging Face layout."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
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
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: first if name in frozen else second for name in sorted(tensors)},
    }
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
