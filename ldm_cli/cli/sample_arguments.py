"""The options of `ldm sample`, and the recipe fields that they set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from ldm_cli.cli.options import argument, option, size
from ldm_cli.errors import UsageError

_EDITING = "Working on a picture"
_SHOWING = "How results are shown"


Arguments = Annotated[list[str] | None, argument("RECIPE|KEY=VALUE", "A recipe, and changes to it; both optional.")]
Model = Annotated[Path | None, option("--model", metavar="DIR|NAME", text="Folder of a pipeline or run; or ORG/NAME.")]
Prompt = Annotated[list[str] | None, option("--prompt", "-p", text="A prompt; may be repeated.")]
Prompts = Annotated[Path | None, option("--prompts", metavar="FILE", text="txt, json, jsonl, csv or tsv.")]
Negative = Annotated[str | None, option("--negative", metavar="TEXT", text="What to avoid.")]
Number = Annotated[int | None, option("-n", metavar="N", text="Images per prompt.")]
Seed = Annotated[int | None, option("--seed", metavar="S", text="Image i of a prompt has seed S + i.")]
Steps = Annotated[int | None, option("--steps", metavar="N", text="Denoising steps.")]
Sampler = Annotated[str | None, option("--sampler", metavar="NAME", text="ddim, euler, dpmpp_2m, unipc, …")]
Guidance = Annotated[float | None, option("--guidance", metavar="G", text="Classifier-free guidance scale.")]
Eta = Annotated[float | None, option("--eta", metavar="E", text="DDIM: 0 adds no noise, 1 is DDPM.")]
Size = Annotated[str | None, option("--size", metavar="WxH", text="Image size in pixels.")]
BatchSize = Annotated[int | None, option("--batch-size", metavar="B", text="Images at a time; changes no image.")]
Latents = Annotated[
    Path | None, option("--latents", metavar="FILE", text="Initial noise: safetensors with the key 'latents'.")
]
Precision = Annotated[str | None, option("--precision", metavar="P", text="fp32, bf16 or fp16.")]
Compiled = Annotated[
    bool | None, option("--compile/--no-compile", text="Compile the model; pays off with many pictures.")
]
Init = Annotated[str | None, option("--init", metavar="IMAGE", panel=_EDITING, text="Picture to start from.")]
Strength = Annotated[
    float | None,
    option("--strength", metavar="S", panel=_EDITING, text="How much of it may change: 0 nothing, 1 everything."),
]
Mask = Annotated[
    str | None, option("--mask", metavar="IMAGE", panel=_EDITING, text="White is generated, black is kept.")
]
Extend = Annotated[
    str | None,
    option("--extend", metavar="L,T,R,B", panel=_EDITING, text="Pixels to add at each edge, or one number for all."),
]
Style = Annotated[str | None, option("--style", metavar="IMAGE", panel=_EDITING, text="Picture whose style to use.")]
Variation = Annotated[
    float | None,
    option("--variation", metavar="V", panel=_EDITING, text="Distance from the first image of a prompt, 0 to 1."),
]
Tile = Annotated[
    int | None, option("--tile", metavar="PX", panel=_EDITING, text="Denoise larger pictures in windows of PX.")
]
Interpolate = Annotated[
    int | None, option("--interpolate", metavar="N", panel=_SHOWING, text="N pictures from each prompt to the next.")
]
XY = Annotated[
    list[str] | None, option("--xy", metavar="FIELD=A,B,…", panel=_SHOWING, text="Grid over a field; twice for two.")
]
PreviewEvery = Annotated[
    int | None, option("--preview-every", metavar="N", panel=_SHOWING, text="Update preview.png every N steps.")
]
ImageFormat = Annotated[str | None, option("--format", metavar="F", panel=_SHOWING, text="png, jpg or webp.")]
Metadata = Annotated[
    bool | None, option("--metadata/--no-metadata", panel=_SHOWING, text="Store settings in the pictures.")
]
Wildcards = Annotated[
    str | None, option("--wildcards", metavar="DIR", text="Folder of word lists for __name__ in prompts.")
]
Repeat = Annotated[
    Path | None, option("--repeat", metavar="IMAGE", text="Generate a picture again; options change it.")
]
_FIELDS = {
    "model": ("--model", "model"),
    "variant": ("--variant", "variant"),
    "negative": ("--negative", "sampling.negative"),
    "number": ("-n", "sampling.images_per_prompt"),
    "seed": ("--seed", "sampling.seed"),
    "steps": ("--steps", "sampling.steps"),
    "sampler": ("--sampler", "sampling.sampler"),
    "guidance": ("--guidance", "sampling.guidance.scale"),
    "eta": ("--eta", "sampling.eta"),
    "width": ("--size", "sampling.width"),
    "height": ("--size", "sampling.height"),
    "batch_size": ("--batch-size", "sampling.batch_size"),
    "precision": ("--precision", "sampling.precision"),
    "compiled": ("--compile", "sampling.compile"),
    "init": ("--init", "edit.image"),
    "strength": ("--strength", "edit.strength"),
    "mask": ("--mask", "edit.mask"),
    "extend": ("--extend", "edit.extend"),
    "style": ("--style", "edit.style"),
    "variation": ("--variation", "variation"),
    "tile": ("--tile", "tile"),
    "interpolate": ("--interpolate", "interpolate"),
    "xy": ("--xy", "xy"),
    "preview_every": ("--preview-every", "preview_every"),
    "image_format": ("--format", "format"),
    "metadata": ("--metadata", "metadata"),
    "wildcards": ("--wildcards", "wildcards"),
}


def recipe_fields(parameters: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """The recipe fields that the given options set: option, field, value.

    Args:
        parameters: of the command by name; None or empty where an option was not given.

    Raises:
        UsageError: the value of an option cannot be read.
    """
    width, height = size(parameters["size"]) or (None, None)
    values = {**parameters, "width": width, "height": height, "extend": _edges(parameters["extend"])}
    for name, convert in (("model", str), ("negative", readable)):
        if values[name] is not None:
            values[name] = convert(values[name])
    return [
        (option, field, values[name]) for name, (option, field) in _FIELDS.items() if values[name] not in (None, (), [])
    ]


def readable(text: str) -> str:
    """An argument with U+FFFD in place of bytes that are not UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _edges(text: str | None) -> list[int] | None:
    """`--extend 32` or `--extend 0,0,32,0`: pixels to add at the left, top, right and bottom edge."""
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) not in (1, 4) or not all(part.strip().isdecimal() for part in parts):
        raise UsageError(f"--extend '{text}' is not understood", remedy="write LEFT,TOP,RIGHT,BOTTOM or one number")
    return [int(part) for part in parts] * (4 // len(parts))
