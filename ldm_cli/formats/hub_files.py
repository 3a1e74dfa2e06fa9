"""Which files of a model on the hub are read: safetensors, configurations and tokenizers of its components."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from ldm_cli.errors import CheckpointError, InputNotFoundError
from ldm_cli.formats.open_clip_folder import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS
from ldm_cli.formats.pipeline_folder import INDEX_NAME, TOKENIZER
from ldm_cli.formats.weight_files import CONFIG_NAME

_UNREAD = ("safety_checker", "feature_extractor")
_VARIANTS = ("fp16", "bf16")
_VARIANT = rf"(?:\.(?:{'|'.join(_VARIANTS)}))?"
_SHARD = r"(?:-\d{5}-of-\d{5})?"
# Versions of diffusers have put the variant before and after the number of the shard, and in three places of an index.
_WHOLE = re.compile(rf"(?:diffusion_pytorch_model|model){_VARIANT}\.safetensors")
_SHARDED = re.compile(
    rf"(?:diffusion_pytorch_model|model){_VARIANT}(?:{_SHARD}{_VARIANT}\.safetensors"
    rf"|\.safetensors{_VARIANT}\.index{_VARIANT}\.json)"
)
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


def components_of(index: Mapping[str, Any], asked: Sequence[str], model: str) -> list[str]:
    """The components of a pipeline that are read.

    Args:
        index: content of model_index.json.
        asked: those that are needed; empty: all that any program of ours reads.
        model: its name, for errors.

    Raises:
        InputNotFoundError: the pipeline has no such component.
    """
    present = [name for name, value in index.items() if isinstance(value, list) and value and all(value)]
    if missing := [name for name in asked if name not in present]:
        raise InputNotFoundError(f"'{model}' has no component '{missing[0]}'", f"it has {', '.join(present)}")
    return list(asked) or [name for name in present if name not in _UNREAD]


def files_of(
    names: Collection[str], components: Sequence[str], variant: str | None, model: str, say: Callable[[str], None]
) -> list[str]:
    """The files to download.

    Args:
        names: of all files of the model, with `/` between folders.
        components: subfolders of a pipeline; of a model by itself "", or `tokenizer` for its tokenizer alone.
        variant: `fp16` or `bf16` prefers weights of that name; None prefers full precision.
        model: its name, for errors.
        say: receives a line where a component lacks the preferred weights.

    Raises:
        InputNotFoundError: a component has no files, or no weights; or none has the variant.
        CheckpointError: the weights of a component are pickles.
    """
    is_pipeline = INDEX_NAME in names
    found = [INDEX_NAME] if is_pipeline else []
    precisions: dict[str, str | None] = {}
    for component in components:
        folder = f"{component}/" if is_pipeline else ""
        own = [name.removeprefix(folder) for name in names if re.fullmatch(f"{re.escape(folder)}[^/]+", name)]
        texts = [name for name in own if name.endswith((".json", ".txt")) and not _is_weights(name)]
        weights: list[str] = []
        if CONFIG_NAME in own and not component.startswith(TOKENIZER):
            weights, precisions[component] = _weights(own, variant, f"{model}/{component}".rstrip("/"))
        elif OPEN_CLIP_CONFIG in own:
            weights = [name for name in OPEN_CLIP_WEIGHTS if name in own][:1]
        if not texts:
            raise InputNotFoundError(f"'{model}' has no files of '{component}'" if component else _no_model(model))
        found += [folder + name for name in (*texts, *weights)]
    others = [name for name, precision in precisions.items() if precision != variant]
    if others and variant is not None and variant not in precisions.values():
        raise InputNotFoundError(f"'{model}' has no weights of the variant '{variant}'", remedy="leave the variant out")
    for name in others:
        say(f"'{model}' has {name or 'its weights'} in {precisions[name] or 'full precision'} only")
    return found


def _no_model(model: str) -> str:
    return f"'{model}' has neither {INDEX_NAME} nor {CONFIG_NAME}"


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors") or ".index" in name


def _weights(names: Sequence[str], variant: str | None, folder: str) -> tuple[list[str], str | None]:
    """The weights of a folder in the first precision that it has, and which that is."""
    for precision in dict.fromkeys((variant, None, *_VARIANTS)):
        same = [name for name in names if _precision(name) == precision]
        whole = [name for name in same if _WHOLE.fullmatch(name)]
        shards = [name for name in same if _SHARDED.fullmatch(name) and name not in whole]
        if not any(name.endswith(".safetensors") for name in shards):
            shards = []
        # Of both, folders of diffusers are read from the shards, those of transformers from the whole file.
        first, second = (shards, whole) if any(name.startswith("diff") for name in shards) else (whole, shards)
        if first or second:
            return first or second, precision
    if pickles := [name for name in names if name.endswith(_PICKLES)]:
        cause = f"'{pickles[0]}' is a pickle, which could run any program"
        raise CheckpointError(f"no safetensors weights in '{folder}'", cause, "take a revision with safetensors")
    raise InputNotFoundError(f"no weights in '{folder}'")


def _precision(name: str) -> str | None:
    return next((variant for variant in _VARIANTS if f".{variant}" in name), None)
