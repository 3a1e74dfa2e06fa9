"""A model folder in the Hugging Face layout: config.json beside safetensors weights, whole or sharded.

Nothing is ever unpickled: a pickle is refused by its content, whatever its name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm_cli.errors import CheckpointError, InputNotFoundError, StorageError

CONFIG_NAME = "config.json"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
TRANSFORMERS_WEIGHTS = "model.safetensors"

_STEMS = ("diffusion_pytorch_model", "model")
_VARIANTS = (None, "fp16", "bf16")
_PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_NUM_NAMED = 5
# Attention of autoencoders written before diffusers 0.17.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# What wrappers put in front of parameter names.
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module"})


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        InputNotFoundError: there is no such file.
        CheckpointError: it holds no JSON object.
    """
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputNotFoundError(
            f"'{path}' not found", remedy="give a folder in the Hugging Face layout"
        ) from error
    except OSError as error:
        raise StorageError(f"cannot read '{path}'", error.strerror or str(error)) from error
    except ValueError as error:
        raise CheckpointError(f"cannot read '{path}'", f"not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"cannot read '{path}'", f"a JSON object expected, {type(content).__name__} found"
        )
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json; errors as in `read_json`."""
    return read_json(folder / CONFIG_NAME)


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files that hold the folder's weights, sorted; more than one when they are sharded.

    Args:
        folder: holds `diffusion_pytorch_model` or `model`, `.safetensors` or `.safetensors.index.json`.
        variant: `fp16` or `bf16` for `….fp16.safetensors`; None: full precision, else what there is.

    Raises:
        InputNotFoundError: no weights, or a shard that the index names is missing.
        CheckpointError: pickles only; an index that is none.
    """
    for wanted in _VARIANTS if variant is None else (variant,):
        for stem in _STEMS:
            suffix = "" if wanted is None else f".{wanted}"
            whole = folder / f"{stem}{suffix}.safetensors"
            if whole.is_file():
                return [whole]
            index = folder / f"{stem}.safetensors.index{suffix}.json"
            if index.is_file():
                return _shards(index)
    pickles = [p.name for p in sorted(folder.glob("*")) if p.suffix in _PICKLE_SUFFIXES]
    if pickles:
        raise CheckpointError(
            f"no safetensors weights in '{folder}'",
            f"'{pickles[0]}' is a pickle, which could run any program",
            "convert it to safetensors",
        )
    raise InputNotFoundError(
        f"no weights in '{folder}'",
        f"neither {DIFFUSERS_WEIGHTS} nor {TRANSFORMERS_WEIGHTS}, nor an index of shards",
        "give a folder in the Hugging Face layout",
    )


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"cannot read '{index}'", "it has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    if any(Path(name).name != name for name in names):
        raise CheckpointError(f"cannot read '{index}'", "its weight_map leads out of the folder")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise InputNotFoundError(f"shards of '{index}' are missing", _named(missing), "download them again")
    return [index.parent / name for name in names]


def load_tensors(folder: Path, variant: str | None = None) -> dict[str, Tensor]:
    """All tensors of a model folder, by name, on the CPU; errors as in `weight_files`.

    Raises:
        CheckpointError: a file is a pickle, damaged, or a pointer to content that was not downloaded.
    """
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder, variant):
        _refuse_foreign_content(file)
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise CheckpointError(
                f"cannot read '{file}'", f"damaged safetensors: {error}", "download or save it again"
            ) from error
        except OSError as error:
            raise StorageError(f"cannot read '{file}'", error.strerror or str(error)) from error
    return tensors


def _refuse_foreign_content(file: Path) -> None:
    """Safetensors begin with the size of a JSON header; name the usual impostors."""
    with file.open("rb") as stream:
        start = stream.read(64)
    if (
        start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"))
        and start[8:9] != b"{"
    ):
        raise CheckpointError(
            f"'{file}' is no safetensors file", "it is a pickle, which could run any program", "convert it"
        )
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"'{file}' is no safetensors file",
            "it is a Git LFS pointer: the content was not downloaded",
            "git lfs pull",
        )


def load_weights(
    module: nn.Module, folder: Path, variant: str | None = None, allow_extra: bool = False
) -> None:
    """Give a module the weights of a model folder, in the types of the module; errors as in `load_tensors`.

    Known other spellings of the names are understood: with or without `text_model.`, attention names of old
    autoencoders, the `position_ids` buffer. A module on the meta device is brought to the CPU, as float32.

    Args:
        module: has the parameter names of the format.
        folder: the model folder.
        variant: as in `weight_files`.
        allow_extra: the folder may hold more than the module has (a CLIPModel, for its text tower).

    Raises:
        CheckpointError: tensors are missing, left over, of another shape or not finite; up to five are named.
    """
    expected = module.state_dict()
    tensors = _in_names_of(expected, load_tensors(folder, variant))
    if allow_extra:
        tensors = {name: tensor for name, tensor in tensors.items() if name in expected}
    _check(expected, tensors, folder)
    # A copy: a tensor that lies in the mapped file at any offset may take another path through a BLAS than an
    # aligned one, and results would hang on the layout of the file.
    on_meta = {name for name, value in expected.items() if value.is_meta}
    converted = {
        name: tensor.to(torch.float32 if name in on_meta else expected[name].dtype, copy=True)
        for name, tensor in tensors.items()
    }
    module.load_state_dict(converted, assign=bool(on_meta))


def _in_names_of(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names that the module uses, as far as they are known spellings of them."""
    renamed = {}
    for name, tensor in tensors.items():
        if name.endswith("embeddings.position_ids") and name not in expected:
            continue
        renamed[next((n for n in _spellings(name) if n in expected), name)] = tensor
    return renamed


def _spellings(name: str) -> Iterable[str]:
    yield name
    yield f"text_model.{name}"
    yield name.removeprefix("text_model.")
    head, _, last = name.rpartition(".")
    head, _, layer = head.rpartition(".")
    if layer in _OLD_ATTENTION:
        yield f"{head}.{_OLD_ATTENTION[layer]}.{last}"


def _check(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], folder: Path) -> None:
    problems = (
        [f"missing: {_named(missing)}"] if (missing := [n for n in expected if n not in tensors]) else []
    )
    if extra := [n for n in tensors if n not in expected]:
        problems.append(f"unexpected: {_named(extra)}")
    shapes = {n: (list(t.shape), list(expected[n].shape)) for n, t in tensors.items() if n in expected}
    if wrong := [f"{n} is {found}, not {wanted}" for n, (found, wanted) in shapes.items() if found != wanted]:
        problems.append(f"of another shape: {_named(wrong)}")
    if problems:
        raise CheckpointError(
            f"the weights in '{folder}' do not fit",
            "; ".join(problems),
            "check that config.json belongs to them",
        )
    if bad := [n for n, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]:
        raise CheckpointError(
            f"the weights in '{folder}' are not finite", _named(bad), "take an earlier checkpoint"
        )


def _named(names: list[str]) -> str:
    """Up to five names, and how many more there are."""
    more = len(names) - _NUM_NAMED
    return ", ".join(names[:_NUM_NAMED]) + (f" and {more} more" if more > 0 else "")


def save_model(
    folder: Path,
    state_dict: Mapping[str, Tensor],
    config: Mapping[str, Any],
    weights_name: str = DIFFUSERS_WEIGHTS,
) -> None:
    """Write config.json and float32 weights, each file whole or not at all, with the mode the umask says.

    Args:
        folder: is created where needed.
        state_dict: name → tensor, on any device; prefixes of wrappers (DDP, compile, FSDP) are taken off.
        config: content of config.json.
        weights_name: `DIFFUSERS_WEIGHTS` or `TRANSFORMERS_WEIGHTS`.

    Raises:
        StorageError: writing failed.
    """
    tensors = {_unwrapped(name): _for_file(tensor) for name, tensor in state_dict.items()}
    target = folder / weights_name
    temporary = folder / f".tmp-{weights_name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG_NAME, config)
        save_file(tensors, temporary, metadata={"format": "pt"})
        # safetensors writes mode 0600; the file just written next to it has what the umask allows.
        shutil.copymode(folder / CONFIG_NAME, temporary)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(target)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(
            f"cannot write '{target}'", str(error), "free some space, or choose another folder"
        ) from error


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _for_file(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).contiguous()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace `path` by a JSON file as a whole.

    Raises:
        StorageError: writing failed.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"cannot write '{path}'", error.strerror or str(error)) from error


def weights_sha256(folder: Path) -> str:
    """Hex sha256 over the tensor bytes of the folder's weights, without the headers, whose order may vary.

    Errors as in `weight_files`.
    """
    digest = hashlib.sha256()
    for file in weight_files(folder):
        with file.open("rb") as stream:
            stream.seek(8 + int.from_bytes(stream.read(8), "little"))
            while block := stream.read(2**20):
                digest.update(block)
    return digest.hexdigest()
