"""The options of `ldm sample`, and the recipe fields that they set."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ldm_cli.cli.options import argument, option, out, size, weighted_path
from ldm_cli.errors import UsageError

_EDITING = "Working on a picture"
_SHOWING = "How results are shown"

Out = Annotated[Path | None, out("the recipe's, or samples/PROMPT-HASH")]
Arguments = Annotated[list[str] | None, argument("RECIPE|KEY=VALUE", "A recipe, and changes to it; both optional.")]
Model = Annotated[Path | None, option("--model", metavar="DIR|NAME", text="Folder of a pipeline or run; or ORG/NAME.")]
Prompt = Annotated[list[str] | None, option("--prompt", "-p", text="A prompt; may be repeated.")]
Prompts = Annotated[Path | None, option("--prompts", metavar="FILE", text="txt, json, jsonl, csv or tsv.")]
Negative = Annotated[str | None, option("--negative", metavar="TEXT", text="What to avoid; default: nothing.")]
Number = Annotated[
    int | None, option("-n", metavar="N", text="Images per prompt; default: 4, and 1 of a picture to enlarge.")
]
Seed = Annotated[int | None, option("--seed", metavar="S", text="Image i of a prompt has seed S + i; default: 0.")]
Steps = Annotated[int | None, option("--steps", metavar="N", text="Denoising steps; default: 50.")]
Sampler = Annotated[
    str | None, option("--sampler", metavar="NAME", text="ddim, euler, dpmpp_2m, unipc, …; default: the model's.")
]
Guidance = Annotated[
    float | None, option("--guidance", metavar="G", text="Classifier-free guidance scale; default: 7.5.")
]
Temperature = Annotated[
    float | None,
    option("--temperature", metavar="T", text="Autoregressive: below 1 bolder, 0 the most probable; default: 1."),
]
TopK = Annotated[
    int | None, option("--top-k", metavar="K", text="Autoregressive: among the K most probable tokens; default: all.")
]
TopP = Annotated[
    float | None, option("--top-p", metavar="P", text="Autoregressive: among tokens of probability P; default: 1.")
]
BestOf = Annotated[int | None, option("--best-of", metavar="N", text="Generate N for each, keep the best by --clip.")]
Clip = Annotated[str | None, option("--clip", metavar="DIR|NAME", text="The CLIP that chooses for --best-of.")]
Eta = Annotated[
    float | None,
    option("--eta", metavar="E", text="Fresh noise: 0 none, 1 all; default: 1 for ancestral and SDE samplers, else 0."),
]
Size = Annotated[str | None, option("--size", metavar="WxH", text="Image size in pixels; default: the model's.")]
BatchSize = Annotated[
    int | None, option("--batch-size", metavar="B", text="Images at a time; changes no image; default: 16.")
]
LongPrompts = Annotated[
    bool | None,
    option("--long-prompts/--no-long-prompts", text="Encode long prompts in chunks, uncut."),
]
ClipSkip = Annotated[
    int | None,
    option("--clip-skip", metavar="N", text="Layer of CLIP: 1 the last, 2 that before; default: the model's."),
]
Latents = Annotated[
    Path | None, option("--latents", metavar="FILE", text="Initial noise: safetensors with the key 'latents'.")
]
Precision = Annotated[
    str | None, option("--precision", metavar="P", text="fp32, bf16 or fp16; default: fp32 on a CPU, bf16 on a GPU.")
]
Compiled = Annotated[
    bool | None, option("--compile/--no-compile", text="Compile the model; pays off with many pictures.")
]
Init = Annotated[str | None, option("--init", metavar="IMAGE", panel=_EDITING, text="Picture to start from.")]
Strength = Annotated[
    float | None,
    option(
        "--strength",
        metavar="S",
        panel=_EDITING,
        text="How much of it may change, from 0 to 1; default: 0.8, with --mask or --extend 1.",
    ),
]
Mask = Annotated[
    str | None, option("--mask", metavar="IMAGE", panel=_EDITING, text="White is generated, black is kept.")
]
Extend = Annotated[
    str | None,
    option("--extend", metavar="L,T,R,B", panel=_EDITING, text="Pixels to add at each edge, or one number for all."),
]
Style = Annotated[str | None, option("--style", metavar="IMAGE", panel=_EDITING, text="Picture whose style to use.")]
Image = Annotated[
    list[str] | None,
    option("--image", metavar="IMAGE", panel=_EDITING, text="unCLIP: picture to vary; two: the way between them."),
]
FromText = Annotated[
    str | None, option("--from-text", metavar="TEXT", panel=_EDITING, text="unCLIP: what changes in the picture …")
]
ToText = Annotated[str | None, option("--to-text", metavar="TEXT", panel=_EDITING, text="unCLIP: … and into what.")]
Variation = Annotated[
    float | None,
    option(
        "--variation",
        metavar="V",
        panel=_EDITING,
        text="Distance from the first image of a prompt, 0 to 1; default: 0, off.",
    ),
]
Tile = Annotated[
    int | None, option("--tile", metavar="PX", panel=_EDITING, text="Denoise larger pictures in windows of PX.")
]
Upscale = Annotated[
    str | None,
    option(
        "--upscale", metavar="DIR|NAME", panel=_EDITING, text="Enlarge the pictures, or that of --init, by a model."
    ),
]
UpscaleNoise = Annotated[
    int | None,
    option(
        "--upscale-noise",
        metavar="N",
        panel=_EDITING,
        text="More lets --upscale make up more details; default: its own.",
    ),
]
Interpolate = Annotated[
    int | None,
    option("--interpolate", metavar="N", panel=_SHOWING, text="N steps from each prompt to the next; default: 0, off."),
]
XY = Annotated[
    list[str] | None, option("--xy", metavar="FIELD=A,B,…", panel=_SHOWING, text="Grid over a field; twice for two.")
]
PreviewEvery = Annotated[
    int | None,
    option(
        "--preview-every",
        metavar="N",
        panel=_SHOWING,
        text="Update preview.png every N predictions; default: 0, never.",
    ),
]
PreviewVae = Annotated[
    str | None, option("--preview-vae", metavar="DIR", panel=_SHOWING, text="Autoencoder that decodes previews.")
]
ImageFormat = Annotated[
    str | None, option("--format", metavar="F", panel=_SHOWING, text="png, jpg or webp; default: png.")
]
Metadata = Annotated[
    bool | None, option("--metadata/--no-metadata", panel=_SHOWING, text="Store settings in the pictures.")
]
Lora = Annotated[
    list[str] | None,
    option("--lora", metavar="FILE[=W]", text="Adapters, and their weight; <lora:NAME:W> in a prompt adds to it."),
]
LoraDir = Annotated[str | None, option("--lora-dir", metavar="DIR", text="Folder of adapters that prompts may name.")]
Embedding = Annotated[
    list[str] | None, option("--embedding", metavar="FILE[=WORD]", text="Textual inversion, and its word in prompts.")
]
ImagePrompt = Annotated[
    list[str] | None,
    option("--image-prompt", metavar="IMAGE[=S]", panel=_EDITING, text="Picture that prompts beside the text."),
]
IPAdapter = Annotated[
    list[str] | None,
    option("--ip-adapter", metavar="FILE|RUN", panel=_EDITING, text="Adapter of all --image-prompt, or of each."),
]
ImageEncoder = Annotated[
    str | None,
    option("--image-encoder", metavar="DIR", panel=_EDITING, text="Image encoder that is not beside the adapter."),
]
Wildcards = Annotated[
    str | None, option("--wildcards", metavar="DIR", text="Folder of word lists for __name__ in prompts.")
]
Repeat = Annotated[
    Path | None, option("--repeat", metavar="IMAGE", text="Generate a picture again; options change it.")
]
_FIELDS = {
    "model": "model",
    "variant": "variant",
    "negative": "sampling.negative",
    "number": "sampling.images_per_prompt",
    "seed": "sampling.seed",
    "steps": "sampling.steps",
    "sampler": "sampling.sampler",
    "guidance": "sampling.guidance.scale",
    "eta": "sampling.eta",
    "temperature": "sampling.temperature",
    "top_k": "sampling.top_k",
    "top_p": "sampling.top_p",
    "best_of": "sampling.guidance.best_of.candidates",
    "clip": "sampling.guidance.best_of.clip",
    "batch_size": "sampling.batch_size",
    "long_prompts": "sampling.long_prompts",
    "clip_skip": "sampling.clip_skip",
    "precision": "sampling.precision",
    "compiled": "sampling.compile",
    "init": "edit.image",
    "strength": "edit.strength",
    "mask": "edit.mask",
    "extend": "edit.extend",
    "style": "edit.style",
    "image": "edit.embedded",
    "from_text": "edit.from_text",
    "to_text": "edit.to_text",
    "variation": "variation",
    "tile": "tile",
    "upscale": "upscale.model",
    "upscale_noise": "upscale.noise_level",
    "interpolate": "interpolate",
    "xy": "xy",
    "preview_every": "preview_every",
    "preview_vae": "preview_vae",
    "image_format": "format",
    "metadata": "metadata",
    "lora": "loras",
    "lora_dir": "lora_dir",
    "embedding": "embeddings",
    "image_prompt": "image_prompts",
    "wildcards": "wildcards",
}


def recipe_fields(context: typer.Context) -> list[tuple[str, str, Any]]:
    """The recipe fields that the given options set: option, field, value.

    Args:
        context: of the command, with its parameters; a value is None or empty where an option was not given.

    Raises:
        UsageError: the value of an option cannot be read.
    """
    loras = [_weighted(text) for text in context.params["lora"] or ()]
    options = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    embeddings = [_embedding(text) for text in context.params["embedding"] or ()]
    values = {**context.params, "lora": loras, "embedding": embeddings, "extend": _edges(context.params["extend"])}
    values["image_prompt"] = _image_prompts(context.params)
    for name, convert in (("model", str), ("negative", readable)):
        if values[name] is not None:
            values[name] = convert(values[name])
    found = [(options[name], field, values[name]) for name, field in _FIELDS.items()]
    width, height = size(values["size"]) or (None, None)
    found += [(options["size"], "sampling.width", width), (options["size"], "sampling.height", height)]
    return [(option, field, value) for option, field, value in found if value not in (None, (), [])]


def in_words_of_options(problem: str) -> str:
    """A problem of the recipe that options make: `--upscale-noise needs --upscale` where the latter is missing.

    >>> in_words_of_options("option '--upscale-noise': upscale: missing required key 'model'")
    '--upscale-noise needs --upscale'
    """
    found = re.fullmatch(r"option '(\S+)': (\S+): missing required key '(\w+)'", problem)
    needed = [name for name, field in _FIELDS.items() if found and field == f"{found[2]}.{found[3]}"]
    return f"{found[1]} needs --{needed[0].replace('_', '-')}" if found and needed else problem


def readable(text: str) -> str:
    """An argument with U+FFFD in place of bytes that are not UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _weighted(text: str) -> dict[str, Any]:
    path, weight = weighted_path(text)
    return {"path": path, "weight": weight}


def _embedding(text: str) -> dict[str, Any]:
    """`FILE` or `FILE=WORD`."""
    path, _, word = text.rpartition("=")
    return {"path": path, "word": word} if path and not Path(text).exists() else {"path": text}


def _image_prompts(params: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`--image-prompt IMAGE[=SCALE]`, each with its `--ip-adapter`; one adapter serves them all."""
    images = [weighted_path(text) for text in params["image_prompt"] or ()]
    adapters, encoder = params["ip_adapter"] or [], params["image_encoder"]
    if not images and (adapters or encoder):
        name = "--ip-adapter" if adapters else "--image-encoder"
        raise UsageError(f"{name} without --image-prompt", remedy="give the picture that prompts")
    if images and len(adapters) not in (1, len(images)):
        what = f"--image-prompt is given {len(images)} times, --ip-adapter {len(adapters)} times"
        raise UsageError(what, remedy="give --ip-adapter once, or once for each picture")
    together = zip(images, adapters * (len(images) if len(adapters) == 1 else 1), strict=True)
    return [
        {"image": image, "scale": scale, "adapter": adapter, "image_encoder": encoder}
        for (image, scale), adapter in together
    ]


def _edges(text: str | None) -> list[int] | None:
    """`--extend 32` or `--extend 0,0,32,0`: pixels to add at the left, top, right and bottom edge."""
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) not in (1, 4) or not all(part.strip().isdecimal() for part in parts):
        raise UsageError(f"--extend '{text}' is not understood", remedy="write LEFT,TOP,RIGHT,BOTTOM or one number")
    return [int(part) for part in parts] * (4 // len(parts))
