"""Provenance: what decides a picture, as JSON in images.json and in the picture itself, enough to generate it again."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ldm_cli import __version__
from ldm_cli.errors import CheckpointError, DataError, LdmError
from ldm_cli.formats.hub import HubName
from ldm_cli.formats.pipeline_folder import TRANSFORMER, UNET
from ldm_cli.formats.png_metadata import OURS, PARAMETERS, format_parameters, read_provenance
from ldm_cli.inputs import MOST_PICTURE_BYTES, read_input
from ldm_cli.sampling.edit_config import EditConfig
from ldm_cli.storage import file_sha256

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

IMAGE_PROMPT_ROLES = ("image", "adapter", "image_encoder")
"""What an image prompt is made of."""
IMAGES_FILE = "images.json"
"""What `ldm sample` writes beside its pictures."""
UPSCALER = "upscaler"
"""The key of `sources` under which the path of the model is that enlarges what the first one generates."""
VERSIONS = {"ldm": __version__, "torch": torch.__version__}


def lora_source(name: str) -> str:
    """The key of `sources` under which the path of some adapters is."""
    return f"lora {name}"


def embedding_source(word: str) -> str:
    """The key of `sources` under which the path of an embedding is."""
    return f"embedding {word}"


def picture_sources(names: Sequence[str]) -> dict[str, str]:
    """Embedded pictures under their keys of `sources`."""
    return {f"picture {number}": name for number, name in enumerate(names, start=1)}


def image_prompt_source(number: int, role: str) -> str:
    """The key of `sources` under which the `image`, `adapter` or `image_encoder` of an image prompt is."""
    return f"image prompt {number}: {role}"


def edit_provenance(edit: EditConfig, meaningless: Collection[str]) -> dict[str, Any]:
    """The work on a picture as JSON: hashes in place of paths, without the fields that mean nothing to the model."""
    provenance = edit.to_mapping() | {"strength": None if edit.image is None else edit.resolved_strength}
    for name in ("image", "mask", "style"):
        path = provenance.pop(name)
        provenance[f"{name}_sha256"] = None if path is None else file_sha256(Path(path))
    if edit.embedded:
        provenance["embedded_sha256"] = [file_sha256(Path(path)) for path in edit.embedded]
    left_out = ("embedded", *meaningless, *(() if edit.embedded else ("from_text", "to_text", "amount")))
    return {name: value for name, value in provenance.items() if name not in left_out}


def full_provenance(job: Mapping[str, Any], image: Mapping[str, Any], sources: Mapping[str, str]) -> dict[str, Any]:
    """The complete provenance of one picture.

    Args:
        job: shared by all pictures of the job: `sampling`, `edit`, `weights`, `scheduler`, …
        image: `prompt`, `seed` and the fields that differ from the job; its `file` is not taken over.
        sources: paths of the model and the pictures to work on, of which the names are kept.
    """
    own = {name: value for name, value in image.items() if name != "file"}
    found = {**job, **own, "sources": dict(sources), "versions": VERSIONS}
    return _with_paths(found, found, _name)


def repeatable_provenance(picture: Path) -> dict[str, Any]:
    """The provenance in a picture, with the paths that images.json beside it has; errors as in `read_provenance`.

    A picture may be given to anybody, so it has names alone: `full_provenance`.
    """
    own = read_provenance(picture)
    try:
        content = json.loads(read_input(picture.with_name(IMAGES_FILE), MOST_PICTURE_BYTES))
        image = next(image for image in content["images"] if image["file"] == picture.name)
        beside = {**content["job"], **image, "sources": content["sources"]}
        if _with_paths(own, beside, _name) == own:
            return _with_paths(own, beside, lambda text: text)
    except (LdmError, ValueError, KeyError, TypeError, StopIteration, RecursionError):
        pass  # the names have to do
    return own


def _with_paths(provenance: Mapping[str, Any], paths: Mapping[str, Any], shown: Callable[[str], str]) -> dict[str, Any]:
    """A provenance whose sources and models of the guidance are those of `paths`, as `shown` shows each."""
    result = {**provenance, "sources": {name: shown(path) for name, path in paths["sources"].items()}}
    guidance = paths.get("sampling", {}).get("guidance", {})
    own: dict[str, Any] = {"model": shown(guidance["model"])} if guidance.get("model") else {}
    if guidance.get("clip"):
        own["clip"] = {**guidance["clip"], "model": shown(guidance["clip"]["model"])}
    if own:
        sampling = provenance["sampling"]
        result["sampling"] = {**sampling, "guidance": {**sampling["guidance"], **own}}
    return result


def _name(source: str) -> str:
    """A model or file without the folders above it; the name of a hub's model as it is."""
    path = Path(source)
    if path.name in (UNET, TRANSFORMER):
        return f"{_name(str(path.parent))}/{path.name}"
    return source if HubName.parse(source) else _model_name(source) or source


def texts_of(provenance: Mapping[str, Any], size: tuple[int, int]) -> dict[str, str]:
    """The texts in a picture of height × width: `parameters` for other programs, and `ldm_cli`, which is JSON."""
    return {PARAMETERS: _parameters(provenance, size), OURS: json.dumps(provenance, ensure_ascii=False, sort_keys=True)}


def recipe_of(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe, as plain data, of the job whose only picture is this one."""
    sources, edit = provenance.get("sources", {}), dict(provenance.get("edit") or {})
    edit = {name: value for name, value in edit.items() if not name.endswith("_sha256")}
    if pictures := [sources[name] for name in picture_sources(("", "")) if name in sources]:
        edit["embedded"] = pictures
    upscale, model = provenance.get("upscale"), sources.get("model", "")
    if upscale is not None:
        settings = {name: value for name, value in upscale.items() if name != "weights"}
        upscale = {**settings, "model": sources.get(UPSCALER, model)}
        model = model if UPSCALER in sources else ""
    entry = {"prompt": provenance["prompt"], "blend": provenance.get("blend")}
    return {
        "command": "sample",
        "model": model,
        "upscale": upscale,
        "prompts": [entry],
        "sampling": {**provenance["sampling"], "seed": provenance["seed"], "images_per_prompt": 1},
        "edit": edit | {name: sources[name] for name in ("image", "mask", "style") if name in sources},
        "variant": provenance.get("variant"),
        "tile": provenance.get("tile"),
        "weighted_words": provenance.get("weighted_words", True),
        "loras": [{"path": sources[lora_source(n)], "weight": w} for n, w in provenance.get("loras", {}).items()],
        "embeddings": [
            {"path": sources[embedding_source(w)], "word": w} for w in provenance.get("embedding_sha256", ())
        ],
        "image_prompts": [
            {"scale": own["scale"], **{role: sources[image_prompt_source(i, role)] for role in IMAGE_PROMPT_ROLES}}
            for i, own in enumerate(provenance.get("image_prompts", ()), 1)
        ],
    }


def check_repeatable(shared: Mapping[str, Any], repeated: Mapping[str, Any], warn: Callable[[str], None]) -> None:
    """Make sure that model and inputs are those of the picture that is repeated.

    Args:
        shared: provenance of the job that repeats it.
        repeated: the picture's own provenance.
        warn: receives a message for each version that differs.

    Raises:
        CheckpointError: the model, one that guides it, adapters or embeddings have changed.
        DataError: a picture to work on, or the latents, have changed.
    """
    for name in ("weights", "scheduler", "stages"):
        if shared.get(name) != repeated.get(name):
            raise CheckpointError("cannot repeat the picture", f"the model's {name} have changed since", "give --model")
    ours, theirs = ((one.get("upscale") or {}).get("weights") for one in (shared, repeated))
    if ours and theirs and ours != theirs:
        raise CheckpointError("cannot repeat the picture", "the weights of the upscaler have changed since")
    for name, digest in repeated.get("guidance_models", {}).items():
        if shared.get("guidance_models", {}).get(name, digest) != digest:
            raise CheckpointError("cannot repeat the picture", f"the weights of guidance.{name} have changed since")
    for name in repeated.get("loras", {}):
        digest = repeated.get("lora_sha256", {}).get(name)
        if shared.get("lora_sha256", {}).get(name, digest) != digest:
            raise CheckpointError("cannot repeat the picture", f"the adapters '{name}' have changed since")
    for word, digest in repeated.get("embedding_sha256", {}).items():
        if shared.get("embedding_sha256", {}).get(word, digest) != digest:
            raise CheckpointError("cannot repeat the picture", f"the embedding '{word}' has changed since")
    for i, (own, other) in enumerate(zip(*(p.get("image_prompts", ()) for p in (shared, repeated)), strict=False), 1):
        for role in IMAGE_PROMPT_ROLES:
            if own[f"{role}_sha256"] != other[f"{role}_sha256"]:
                error = DataError if role == "image" else CheckpointError
                raise error("cannot repeat the picture", f"the {role} of image prompt {i} has changed since")
    ours, theirs = shared.get("edit") or {}, repeated.get("edit") or {}
    for name in ("image", "mask", "style", "embedded"):
        if theirs.get(f"{name}_sha256") != ours.get(f"{name}_sha256"):
            raise DataError("cannot repeat the picture", f"the {name} it was made of has changed since")
    if repeated.get("latents_sha256") != shared.get("latents_sha256"):
        raise DataError("cannot repeat the picture", "the latents it was made of have changed since")
    for name, version in VERSIONS.items():
        before = repeated.get("versions", {}).get(name)
        if before != version:
            warn(f"made with {name} {before}, repeated with {version}: pixels may differ by rounding")


def _parameters(provenance: Mapping[str, Any], size: tuple[int, int]) -> str:
    sampling, edit, blend = provenance["sampling"], provenance.get("edit"), provenance.get("blend") or {}
    variation = blend if blend.get("prompt") == provenance["prompt"] else {}
    loras: Mapping[str, float] = provenance.get("loras", {})
    hashes = [f"{name}: {provenance['lora_sha256'][name][:8]}" for name in loras]
    fields = {
        "Steps": sampling.get("steps"),
        "Sampler": _A1111_SAMPLERS.get(sampling.get("sampler")),
        "Schedule type": _A1111_SCHEDULES.get(sampling.get("timestep_spacing")),
        "CFG scale": sampling["guidance"].get("scale"),
        "Seed": provenance["seed"],
        "Size": f"{size[1]}x{size[0]}",
        "Model hash": next(iter(provenance["weights"].values()), "")[:10] or None,
        "Model": _model_name(provenance["sources"].get("model")),
        "Variation seed": variation.get("seed"),
        "Variation seed strength": variation.get("weight"),
        "Clip skip": sampling.get("clip_skip"),
        "Denoising strength": edit.get("strength") if edit and edit.get("image_sha256") else None,
        "Lora hashes": ", ".join(hashes) or None,
        "Version": f"ldm_cli {VERSIONS['ldm']}",
    }
    prompt = " ".join([provenance["prompt"], *(f"<lora:{name}:{weight:g}>" for name, weight in loras.items())])
    return format_parameters(prompt, sampling["negative"], fields)


def _model_name(folder: str | None) -> str | None:
    """The run's name for a model in a run, else the folder's; of a hub's model its name without the commit."""
    if not folder:
        return None
    name = HubName.parse(folder)
    path = Path(folder if name is None else name.repo)
    return path.parent.name if path.name in _FOLDERS_WITHIN_A_RUN else path.name
