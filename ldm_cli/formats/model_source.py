"""Where the JSON files and the tensors of a model come from: a folder, or a single file that stands for one.

A path goes on inside a single file: `sd15.safetensors/unet` is its U-Net, `sd15.safetensors/unet/config.json` that
model's configuration. Code that reads model folders by these functions therefore reads single files as well.
"""

from __future__ import annotations

import ctypes
import hashlib
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_cli.errors import CheckpointError, InputNotFoundError
from ldm_cli.formats.json_file import read_json
from ldm_cli.formats.open_clip_folder import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS, open_clip_files, open_clip_weights
from ldm_cli.formats.pipeline_folder import TEXT_ENCODER
from ldm_cli.formats.single_file import Part, SingleFile, single_file
from ldm_cli.formats.single_file_index import beside
from ldm_cli.formats.weight_files import CONFIG_NAME, read_metadata, read_tensors, release, tensors_sha256, weight_files
from ldm_cli.manifest import remembered_digest


def split_at_file(path: Path) -> tuple[Path, Path] | None:
    """The single file that a path leads into, and the rest of the path; None if it leads into none.

    A folder of open_clip stands for the file of its weights.

    >>> split_at_file(Path("folder/unet")) is None
    True
    """
    own = (path,) if path.suffix != ".json" else ()
    file = next((p for p in (*own, *path.parents) if p.is_file()), None)
    if file is not None:
        return file, path.relative_to(file)
    folder = path if path.is_dir() else path.parent
    weights = open_clip_weights(folder)
    return None if weights is None else (weights, path.relative_to(folder))


def read_model_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file of a model; errors as in `read_json` and `single_file`."""
    path = _located(path)
    found = split_at_file(path)
    if found is None:
        return read_json(path)
    content = _json_file(*found)
    if content is None:
        component = found[1].parts[0] if found[1].parts else ""
        remedy = f"put the folder '{component}' beside it" if component.startswith(TEXT_ENCODER) else ""
        raise InputNotFoundError(f"'{path}' not found", f"the file holds {_listed(_opened(found[0]))}", remedy)
    return content


def has_model_json(path: Path) -> bool:
    """Whether `read_model_json` finds a file; errors as in `single_file`."""
    path = _located(path)
    found = split_at_file(path)
    return path.is_file() if found is None else _json_file(*found) is not None


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model by the names of its folder, mapped and not read; errors as in `weight_files`.

    Raises:
        CheckpointError: a file is a pickle, damaged, or a pointer to content that was not downloaded; a single file
            holds several models, and the path names none of them.
    """
    folder = _located(folder)
    found = split_at_file(folder)
    if found is not None:
        return _part(*found).as_in_folder()
    return {name: tensor for file in weight_files(folder) for name, tensor in read_tensors(file).items()}


def weights_sha256(folder: Path) -> str:
    """Hex sha256 over the tensor bytes of a model; errors as in `load_tensors`.

    A folder whose tensors have one type and lie in one file has the hash of a single file with the same tensors.
    """
    folder = _located(folder)
    found = split_at_file(folder)
    if found is None:
        return tensors_sha256(weight_files(folder))

    def compute() -> str:
        digest = hashlib.sha256()
        for _, tensor in sorted(load_tensors(folder).items()):
            tensor = tensor.contiguous()
            digest.update(memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())))
            release(tensor)
        return digest.hexdigest()

    return remembered_digest([found[0]], f"part {found[1]}", compute)


def outside_file(file: Path, name: str) -> Path:
    """The folder of a component that no single file holds, a tokenizer, `beside` the file.

    Raises:
        InputNotFoundError: there is none.
    """
    found = beside(file, name)
    if found is None:
        cause = f"there is no folder '{file.with_suffix('') / name}' or '{file.parent / name}'"
        remedy = f"put its files there, or run `ldm convert {file} FOLDER --tokenizer DIR`"
        raise InputNotFoundError(f"no {name} for '{file}'", cause, remedy)
    return found


def _located(path: Path) -> Path:
    """The path, or where it leads `beside` a single file that does not hold the text encoder that it names."""
    file, inside = split_at_file(path) or (path, Path())
    if not inside.parts or not inside.parts[0].startswith(TEXT_ENCODER) or inside.parts[0] in _opened(file).parts:
        return path
    folder = beside(file, inside.parts[0])
    return path if folder is None else folder.joinpath(*inside.parts[1:])


def _json_file(file: Path, inside: Path) -> dict[str, Any] | None:
    """A JSON file of a single file; that of the only model in it also without the name of its subfolder."""
    opened = _opened(file)
    names = [str(inside), *(str(Path(part, inside)) for part in opened.parts if len(opened.parts) == 1)]
    return next((opened.json_files[name] for name in names if name in opened.json_files), None)


def _part(file: Path, inside: Path) -> Part:
    """The model that the rest of a path names, or the only one."""
    # Not the cached tensors of `_opened`: the reader of these releases their pages.
    parts = single_file(read_tensors(file), read_metadata(file), file).parts
    if inside == Path() and len(parts) == 1:
        return next(iter(parts.values()))
    if str(inside) not in parts:
        remedy = f"write '{file / next(iter(parts))}', say"
        raise CheckpointError(
            f"cannot use '{file / inside}' as one model", f"the file holds {_listed(_opened(file))}", remedy
        )
    return parts[str(inside)]


def _listed(opened: SingleFile) -> str:
    return ", ".join(part or "one model" for part in opened.parts)


def _opened(file: Path) -> SingleFile:
    status = file.stat()
    return _recognised(file, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=4)
def _recognised(file: Path, modified: int, size: int) -> SingleFile:
    """The file as it is now; its tensors are mapped and never read."""
    opened = single_file(read_tensors(file), read_metadata(file), file)
    if file.name not in OPEN_CLIP_WEIGHTS or not (file.parent / OPEN_CLIP_CONFIG).is_file():
        return opened
    return replace(opened, json_files=open_clip_files(file.parent, opened.json_files[CONFIG_NAME]))
