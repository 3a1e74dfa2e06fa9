"""Which model a path means, and which family it belongs to."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm_cli import families
from ldm_cli.core.precision import precision_on
from ldm_cli.errors import CheckpointError, InputNotFoundError
from ldm_cli.families.family import ImageGenerator
from ldm_cli.families.ip_adapter import IP_ADAPTER
from ldm_cli.formats.lora_path import DIFFUSERS_LORA
from ldm_cli.formats.model_source import has_model_json, read_model_json, split_at_file
from ldm_cli.formats.pipeline_folder import INDEX_NAME, PRIOR_PIPELINE
from ldm_cli.formats.weight_files import CONFIG_NAME
from ldm_cli.storage import resolve_model_folder

_ADAPTERS = (
    (DIFFUSERS_LORA, "adapters of one (LoRA)", "--lora"),
    (IP_ADAPTER, "an image prompt adapter", "--ip-adapter"),
)


def open_family(
    path: Path, device: torch.device | str = "cpu", precision: str | None = None, *, compiled: bool = False
) -> ImageGenerator:
    """Read a model: a folder of a known kind from anywhere, a run of `train-unet` or `train-ar`, or one
    of its checkpoints.

    A family is a module of this package with three functions: `is_mine(folder)`, `open_folder(folder, device,
    precision, compiled=…)` and `outline_folder(folder)`, whose arguments and errors are those of this function.

    Args:
        path: the folder, or a single file.
        device: where to put the networks.
        precision: `fp32`, `bf16` or `fp16`; None: as in `precision_on`.
        compiled: whether its networks are compiled.

    Raises:
        InputNotFoundError: the folder or a part of it is missing.
        CheckpointError: it is of an unknown kind, damaged, or asks for something that is not implemented.
    """
    folder = resolve_model(path)
    open_folder = _module_of(folder).open_folder
    generator: ImageGenerator = open_folder(folder, device, precision_on(device, precision), compiled=compiled)
    return generator


def outline_family(folder: Path) -> dict[str, nn.Module]:
    """The models of a folder on the meta device, by subfolder, once all its files are known to fit together.

    Weights are looked at and not read; errors are those of `open_family`.
    """
    models: dict[str, nn.Module] = _module_of(folder).outline_folder(folder)
    return models


def _module_of(folder: Path) -> Any:
    """The family whose folder this is."""
    for found in pkgutil.iter_modules(families.__path__):
        module = importlib.import_module(f"{families.__name__}.{found.name}")
        if hasattr(module, "is_mine") and module.is_mine(folder):
            return module
    if not has_model_json(folder / INDEX_NAME):
        is_part = has_model_json(folder.parent / INDEX_NAME)
        whole = f"'{folder.parent}'" if is_part else "a folder of Stable Diffusion, or a run of train-unet or train-ar"
        raise InputNotFoundError(f"no pipeline in '{folder}'", _what_is_there(folder), f"give {whole}")
    kind = read_model_json(folder / INDEX_NAME).get("_class_name")
    if kind == PRIOR_PIPELINE:
        remedy = f"join them by 'ldm convert DECODER OUT --prior {folder}', and take OUT"
        raise CheckpointError(f"'{folder}' is a prior alone", "a decoder makes pictures of its embeddings", remedy)
    raise CheckpointError(f"cannot use '{folder}'", f"it holds a {kind!r}, which is not supported")


def _what_is_there(folder: Path) -> str:
    """What a folder without an index of a pipeline holds, in words."""
    config = read_model_json(folder / CONFIG_NAME) if has_model_json(folder / CONFIG_NAME) else {}
    names = config.get("architectures")
    kind = config.get("_class_name") or (names[0] if isinstance(names, list) and names else config.get("model_type"))
    return f"it holds one model, {kind}, which alone generates nothing" if kind else f"{INDEX_NAME} is missing"


def resolve_model(path: Path) -> Path:
    """The model folder or file that a path means: itself, or the model of a run, a checkpoint or a hub cache's root.

    A run's is `model/` once it is finished, before that its newest checkpoint; a checkpoint's is `ema/` where
    weights are averaged, else `model/`.

    Raises:
        InputNotFoundError: there is no such folder, or no model in it.
    """
    path = resolve_model_folder(path)
    if split_at_file(path) is not None:
        return path
    if path.is_file():
        raise InputNotFoundError(f"'{path}' is no model", "it is one file of a folder", "give the folder")
    if not path.is_dir():
        raise InputNotFoundError(f"model '{path}' not found", remedy="check the path, or train it first")
    manifests = sorted((path / "checkpoints").glob("step-*/manifest.json"))
    newest = [manifests[-1].parent / name for name in ("ema", "model")] if manifests else []
    for folder in (path, path / "ema", path / "model", *newest):
        if (folder / INDEX_NAME).is_file() or (folder / CONFIG_NAME).is_file():
            return folder
    for name, what, option in _ADAPTERS:
        if found := next((one for one in (path, path / "model", *newest) if (one / name).is_file()), None):
            remedy = f"name the model that was trained with it, and give this as {option} {found}"
            raise InputNotFoundError(f"no model in '{path}'", f"it holds {what}", remedy)
    raise InputNotFoundError(
        f"no model in '{path}'", f"neither {INDEX_NAME} nor {CONFIG_NAME}", "give a model folder or a run"
    )
