"""What decides a picture, as JSON: kept in images.json and in the picture itself, enough to draw it again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ldm_cli import __version__
from ldm_cli.errors import CheckpointError, DataError
from ldm_cli.formats.png_metadata import OURS, PARAMETERS, format_parameters

_A1111_SAMPLERS = {
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "dpm2": "DPM2",
    "lms": "LMS",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_2s_ancestral": "DPM++ 2S a",
    "dpmpp_sde": "DPM++ SDE",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "unipc": "UniPC",
    "pndm": "PLMS",
    "flow_euler": "Euler",
    "flow_heun": "Heun",
    "lcm": "LCM",
}
_A1111_SCHEDULES = {"karras": "Karras", "exponential": "Exponential"}
_FOLDERS_WITHIN_A_RUN = ("model", "ema")

VERSIONS = {"ldm": __version__, "torch": torch.__version__}


def full_record(job: Mapping[str, Any], image: Mapping[str, Any], sources: Mapping[str, str]) -> dict[str, Any]:
    """The record of one picture, which says all without its neighbours.

    Args:
        job: what all pictures of the job share: `sampling`, `edit`, `weights`, `scheduler`, …
        image: `prompt`, `seed` and what differs from the job; its `file` is left out.
        sources: where the model and the pictures to work on are.
    """
    own = {name: value for name, value in image.items() if name != "file"}
    return {**job, **own, "sources": dict(sources), "versions": VERSIONS}


def texts_of(record: Mapping[str, Any], size: tuple[int, int]) -> dict[str, str]:
    """What a picture of height × width says of itself: `parameters` for other programs, `ldm_cli` as JSON."""
    return {
        PARAMETERS: _parameters(record, size),
        OURS: json.dumps(record, ensure_ascii=False, sort_keys=True),
    }


def recipe_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe, as plain data, of the job whose only picture is this one."""
    sources, edit = record.get("sources", {}), dict(record.get("edit") or {})
    edit = {name: value for name, value in edit.items() if not name.endswith("_sha256")}
    entry = {"prompt": record["prompt"], "blend": record.get("blend")}
    return {
        "command": "sample",
        "model": sources.get("model", ""),
        "prompts": [entry],
        "sampling": {**record["sampling"], "seed": record["seed"], "images_per_prompt": 1},
        "edit": edit | {name: sources[name] for name in ("image", "mask", "style") if name in sources},
        "tile": record.get("tile"),
        "weighted_words": record.get("weighted_words", True),
    }


def check_repeatable(shared: Mapping[str, Any], repeated: Mapping[str, Any], warn: Callable[[str], None]) -> None:
    """Make sure that a picture is drawn again with what it was drawn with.

    Args:
        shared: of the job that repeats it.
        repeated: the picture's own record.
        warn: is told of versions that differ.

    Raises:
        CheckpointError: the model, or one that guides it, is another one.
        DataError: a picture to work on, or the latents, are not what they were.
    """
    for name in ("weights", "scheduler"):
        if shared[name] != repeated.get(name):
            raise CheckpointError("cannot repeat the picture", f"the model's {name} have changed since", "give --model")
    for name, digest in repeated.get("guidance_models", {}).items():
        if shared.get("guidance_models", {}).get(name, digest) != digest:
            raise CheckpointError("cannot repeat the picture", f"the weights of guidance.{name} have changed since")
    ours, theirs = shared.get("edit") or {}, repeated.get("edit") or {}
    for name in ("image", "mask", "style"):
        if theirs.get(f"{name}_sha256") != ours.get(f"{name}_sha256"):
            raise DataError("cannot repeat the picture", f"the {name} it was made of has changed since")
    if repeated.get("latents_sha256") != shared.get("latents_sha256"):
        raise DataError("cannot repeat the picture", "the latents it was made of have changed since")
    for name, version in VERSIONS.items():
        before = repeated.get("versions", {}).get(name)
        if before != version:
            warn(f"drawn with {name} {before}, repeated with {version}: pixels may differ by rounding")


def _parameters(record: Mapping[str, Any], size: tuple[int, int]) -> str:
    sampling, edit, blend = record["sampling"], record.get("edit"), record.get("blend") or {}
    variation = blend if blend.get("prompt") == record["prompt"] else {}
    fields = {
        "Steps": sampling["steps"],
        "Sampler": _A1111_SAMPLERS[sampling["sampler"]],
        "Schedule type": _A1111_SCHEDULES.get(sampling["timestep_spacing"]),
        "CFG scale": sampling["guidance"]["scale"],
        "Seed": record["seed"],
        "Size": f"{size[1]}x{size[0]}",
        "Model hash": record["weights"].get("unet", "")[:10] or None,
        "Model": _model_name(record["sources"].get("model")),
        "Variation seed": variation.get("seed"),
        "Variation seed strength": variation.get("weight"),
        "Denoising strength": None if edit is None else edit["strength"],
        "Version": f"ldm_cli {VERSIONS['ldm']}",
    }
    return format_parameters(record["prompt"], sampling["negative"], fields)


def _model_name(folder: str | None) -> str | None:
    """The run's name for a model in a run, else the folder's."""
    if not folder:
        return None
    path = Path(folder)
    return path.parent.name if path.name in _FOLDERS_WITHIN_A_RUN else path.name
