"""Files of tensors: safetensors, and how a model's weights lie in them, whole, sharded or in half precision.

Nothing is ever unpickled: a pickle is refused by its content, whatever its name.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import mmap
import os
import re
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm_cli.errors import CheckpointError, InputNotFoundError, LdmError, StorageError
from ldm_cli.formats.json_file import read_json
from ldm_cli.inputs import input_errors, open_input
from ldm_cli.manifest import expect_listed, remembered_digest
from ldm_cli.storage import error_number, resolve_model_folder, whole_file

CONFIG_NAME = "config.json"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
TRANSFORMERS_WEIGHTS = "model.safetensors"

_STEMS = ("diffusion_pytorch_model", "model")
_INFIXES = ("", ".fp16", ".bf16")
_PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_NUM_NAMED = 5
_PLAIN = {"format": "pt"}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the folder's weights, sorted; more than one when they are sharded.

    Files in full precision come before `….fp16.safetensors` and `….bf16.safetensors`. Of an index and a whole file of
    the same name, diffusers reads the index, transformers the whole file.

    Args:
        folder: holds `diffusion_pytorch_model` or `model`, `.safetensors` or `.safetensors.index.json`.

    Raises:
        InputNotFoundError: no weights, or a shard that the index names is missing.
        CheckpointError: pickles only; an index that is none.
    """
    folder = resolve_model_folder(folder)
    for infix in _INFIXES:
        for stem in _STEMS:
            whole = f"{stem}{infix}.safetensors"
            # The last two spellings are those of old versions.
            indexes = [f"{stem}.safetensors{name}.json" for name in (f".index{infix}", f"{infix}.index")]
            indexes.append(f"{whole}.index.json")
            names = [whole, *indexes] if whole.startswith("model") else [*indexes, whole]
            for file in (folder / name for name in names):
                if file.is_file():
                    return [file] if file.suffix == ".safetensors" else _shards(file)
    pickles = [p.name for p in sorted(folder.glob("*")) if p.suffix in _PICKLE_SUFFIXES]
    if pickles:
        raise CheckpointError(
            f"no safetensors weights in '{folder}'",
            f"'{pickles[0]}' is a pickle, which could run any program",
            "convert it: `ldm convert --allow-pickle`",
        )
    if not folder.is_dir():
        raise InputNotFoundError(f"model '{folder}' not found", remedy="check the path, or train it first")
    others = [file.name for file in sorted(folder.glob("*.safetensors"))]
    raise InputNotFoundError(
        f"no weights in '{folder}'",
        f"neither {DIFFUSERS_WEIGHTS} nor {TRANSFORMERS_WEIGHTS}, nor an index of shards"
        + (f"; it holds {named(others)}: rename what you want" if others else ""),
        f"give '{folder / 'model'}'" if (folder / "model").is_dir() else "give a folder in the Hugging Face layout",
    )


def shard_names(weights_name: str, num_shards: int) -> list[str]:
    """`model.safetensors` → `model-00001-of-00002.safetensors`, …"""
    stem = weights_name.removesuffix(".safetensors")
    return [f"{stem}-{number:05d}-of-{num_shards:05d}.safetensors" for number in range(1, num_shards + 1)]


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"cannot read '{index}'", "it has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    if any(Path(name).name != name for name in names):
        raise CheckpointError(f"cannot read '{index}'", "its weight_map leads out of the folder")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise InputNotFoundError(f"shards of '{index}' are missing", named(missing), "download them again")
    return [index.parent / name for name in names]


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, by name, on the CPU; they are mapped, and none is read yet.

    Raises:
        CheckpointError: it is a pickle, damaged, or a pointer to content that was not downloaded.
        InputNotFoundError, StorageError: it cannot be read.
        MemoryError: it does not fit.
    """
    refuse_foreign_content(file)
    expect_listed(file)
    try:
        return load_file(file)
    except (SafetensorError, RuntimeError) as error:  # safetensors opens it, and then torch once more
        number = error_number(error)
        if number == errno.ENOMEM:
            raise MemoryError(f"cannot map '{file}'") from error
        if number is not None:
            raise StorageError(f"cannot read '{file}'", os.strerror(number)) from error
        if isinstance(error, RuntimeError):
            raise
        raise CheckpointError(
            f"cannot read '{file}'", f"damaged safetensors: {error}", "download or save it again"
        ) from error


def read_pickle(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file of `torch.save`, and `global_step` where it holds that.

    torch's `weights_only` reader makes nothing but tensors and plain values, so that the file can run no program.

    Raises:
        CheckpointError: it is no such file, or holds more.
        InputNotFoundError, StorageError: it cannot be read.
    """
    # torch reads a path that ends so as safetensors, whatever the content.
    is_misnamed = file.suffix == ".safetensors"
    try:
        with open_input(file) as stream:
            source, is_mapped = (stream, False) if is_misnamed else (file, zipfile.is_zipfile(file))
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=is_mapped)
    except LdmError:
        raise
    except OSError as error:
        raise StorageError(f"cannot read '{file}'", error.strerror or str(error)) from error
    except Exception as error:  # of any type: the file decides what is built
        asked = re.search(r"GLOBAL (\S+)", str(error))
        cause = f"it asks for {asked[1]}, which is no tensor" if asked else "it is damaged, or not of torch.save"
        raise CheckpointError(f"cannot read '{file}'", cause, "convert it with the program that wrote it") from error
    nested = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(nested, dict):
        raise CheckpointError(f"cannot read '{file}'", f"a table of tensors expected, {type(nested).__name__} found")
    for part in ("image_proj", "ip_adapter"):  # of IP-Adapter
        inner = nested.get(part)
        nested = nested | {f"{part}.{name}": t for name, t in (inner.items() if isinstance(inner, dict) else ())}
    tensors = {str(name).removeprefix("module."): t for name, t in nested.items() if isinstance(t, Tensor)}
    step = content.get("global_step")
    return tensors, {"global_step": str(step)} if isinstance(step, int) else {}


def read_metadata(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file that `read_tensors` has read."""
    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata() or {})


def release(tensor: Tensor) -> None:
    """Give the memory pages of a mapped tensor back, which is not read again.

    What was read of a mapped file counts as memory in use, so that a model and the file it is copied from would take
    twice the room.
    """
    if sys.platform == "linux":
        first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = (tensor.data_ptr() + tensor.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
        if size > 0:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] = _PLAIN) -> None:
    """Write a safetensors file as a whole, with the mode that the umask says; errors as in `whole_file`."""
    with whole_file(file) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, {**_PLAIN, **metadata})
        temporary.chmod(mode)  # safetensors puts a file of mode 0600 in its place


def is_pickle(file: Path) -> bool:
    """Whether a file begins as those of `torch.save`; errors as in `open_input`."""
    start = _start(file)
    return start.startswith(_PICKLE_STARTS) and start[8:9] != b"{"


def _start(file: Path) -> bytes:
    with open_input(file) as stream, input_errors(file):
        return stream.read(64)


def refuse_foreign_content(file: Path) -> None:
    """Name the usual impostors by their first bytes; safetensors begin with the size of a JSON header.

    Raises:
        CheckpointError: a pickle, or a pointer to content that was not downloaded.
        InputNotFoundError, StorageError: it cannot be read.
    """
    if is_pickle(file):
        raise CheckpointError(
            f"'{file}' is no safetensors file",
            "it is a pickle, which could run any program",
            "convert it: `ldm convert --allow-pickle`",
        )
    if _start(file).startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"'{file}' is no safetensors file",
            "it is a Git LFS pointer: the content was not downloaded",
            "git lfs pull",
        )


def tensors_sha256(files: Sequence[Path]) -> str:
    """Hex sha256 over the tensor bytes of safetensors files, without their headers, whose order may vary."""

    def compute() -> str:
        digest = hashlib.sha256()
        for file in files:
            with file.open("rb") as stream:
                stream.seek(8 + int.from_bytes(stream.read(8), "little"))
                while block := stream.read(2**20):
                    digest.update(block)
        return digest.hexdigest()

    return remembered_digest(files, "tensors", compute)


def named(names: list[str], separator: str = ", ") -> str:
    """Up to five names, and how many more there are."""
    more = len(names) - _NUM_NAMED
    return separator.join(names[:_NUM_NAMED]) + (f" and {more} more" if more > 0 else "")
