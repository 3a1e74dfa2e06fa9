"""Every generator side by side: the same scenes, prompts and seeds, with what each one costs and reaches.

`python benchmarks/gallery.py` takes those demos that have been run (`make demo`, `make demo-ar`, …), generates and
measures with `ldm` commands, and writes runs/gallery/index.html, a page that loads nothing else. What is measured
already is not measured again.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from ldm_cli.evaluation.intervals import share_interval
from ldm_cli.families.open_family import outline_family, resolve_model
from ldm_cli.plots.panels import DARK, LIGHT

PROMPTS = (
    "a large red circle in the center on a white background",
    "a medium green triangle at the bottom right on a white background",
    "a large blue square at the top left on a black background",
    "a yellow star left of a purple ring",
)
_SEEDS = 2
_SIDE = 128
_PROCESSES = 2
"""Of each training in the Makefile."""
_TEMPLATE = Path(__file__).with_suffix(".html")
_HEADS = ("shape and colour", "Fréchet distance", "parameters", "processor seconds to train", "pictures a second")
_SHORT_HEADS = ("right", "Fréchet", "weights", "seconds", "a second")


@dataclass(frozen=True)
class Generator:
    """One row.

    Attributes:
        key: name of its folder.
        title, text: what it is.
        model: run or folder that `ldm sample` takes.
        runs: everything that was trained for it.
        target: of the Makefile, which trains it.
        settings: fields of `sampling`.
    """

    key: str
    title: str
    text: str
    model: str
    runs: tuple[str, ...]
    target: str
    settings: dict[str, Any]


_LATENT = ("demo-vae", "demo-clip", "demo-unet")
_GUIDED = {"guidance": {"scale": 2.5}}
GENERATORS = (
    Generator(
        "ddpm",
        "Latent diffusion, DDPM",
        "A U-Net removes noise from the latents of an autoencoder, in 100 random steps.",
        "demo-unet",
        _LATENT,
        "demo",
        {"sampler": "ddpm", "steps": 100, **_GUIDED},
    ),
    Generator(
        "ddim",
        "Latent diffusion, DDIM",
        "The same model in 20 steps without randomness.",
        "demo-unet",
        _LATENT,
        "demo",
        {"sampler": "ddim", "steps": 20, **_GUIDED},
    ),
    Generator(
        "sd3",
        "Rectified flow (Stable Diffusion 3)",
        "A transformer over patches and text follows straight lines from noise to latents.",
        "demo-sd3",
        ("demo-vae16", "demo-clip", "demo-clip-2", "demo-sd3"),
        "demo-sd3",
        {"steps": 20, **_GUIDED},
    ),
    Generator(
        "unclip",
        "unCLIP (DALL·E 2)",
        "A prior makes a CLIP image embedding of the text, a decoder a picture of the embedding.",
        "demo-unclip",
        ("demo-vae", "demo-clip", "demo-prior", "demo-decoder"),
        "demo-unclip",
        {"steps": 20, "guidance": {"scale": 2.0}, "prior": {"scale": 2.0}},
    ),
    Generator(
        "ar",
        "Autoregressive (DALL·E)",
        "A transformer writes the codes of a picture one by one after the text.",
        "demo-ar",
        ("demo-vq", "demo-clip", "demo-ar"),
        "demo-ar",
        {"guidance": {"scale": 1.5}, "top_p": 0.95},
    ),
    Generator(
        "cascade",
        "Pixel cascade (Imagen)",
        "A small picture first, in pixels; then a second model makes it four times as large.",
        "cascade",
        ("demo-clip", "cascade-base", "cascade-large"),
        "demo-cascade",
        {},
    ),
    Generator(
        "lora",
        "Latent diffusion with LoRA",
        "The first model after it learnt a ninth colour from 40 pictures, by adapters of low rank.",
        "demo-lora-merged",
        (*_LATENT, "demo-lora"),
        "demo-lora",
        {"sampler": "ddim", "steps": 20, **_GUIDED},
    ),
)


def main() -> None:
    """Measure what is there, and write the page."""
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--runs", type=Path, default=Path("runs"), help="folder with the runs of the demos")
    given.add_argument("--data", default="data/demo/val-*.tar", help="held-out scenes")
    given.add_argument("--generated", type=int, default=256, help="pictures to measure on")
    arguments = given.parse_args()
    out = arguments.runs / "gallery"
    found = [one for one in GENERATORS if (arguments.runs / one.model).is_dir()]
    if not found:
        sys.exit("no demo has been run: begin with `make demo`")
    for one in found:
        print(f"{one.title}", flush=True)
        measure(one, arguments.runs, out, arguments.data, arguments.generated)
    missing = [one for one in GENERATORS if one not in found]
    rows = [(one, figures(one, arguments.runs, out)) for one in found]
    (out / "index.html").write_text(page(rows, missing, out), encoding="utf-8")
    lines = [f"| {one.key} | {' | '.join(cells)} |" for one, cells in rows]
    head = [f"| generator | {' | '.join(_SHORT_HEADS)} |", "|---" * (1 + len(_SHORT_HEADS)) + "|"]
    (out / "table.md").write_text("\n".join([*head, *lines, ""]), encoding="utf-8")
    sheet(found, out).save(out / "gallery.png")
    print(f"Look at {out / 'index.html'}.")


def measure(one: Generator, runs: Path, out: Path, data: str, generated: int) -> None:
    """Generate the pictures of the page, and measure the generator on held-out scenes; once."""
    folder, model = out / one.key, str(runs / one.model)
    settings = [f"sampling.{name}={json.dumps(value)}" for name, value in one.settings.items()]
    prompts = [part for prompt in PROMPTS for part in ("-p", prompt)]
    result = folder / "sample.json"
    if not result.is_file():
        options = ("--model", model, *prompts, "-n", str(_SEEDS), "--seed", "0", "--out", str(folder / "pictures"))
        printed = ldm("sample", *options, "--json", "--overwrite", *settings)
        result.parent.mkdir(parents=True, exist_ok=True)
        result.write_text(printed)
    measured = ("eval.metrics=[frechet_distance,attribute_accuracy]", f"eval.num_generated={generated}")
    sampling = json.dumps({**one.settings, "images_per_prompt": 1})
    ldm(
        *("eval", "demo/eval", f"data.shards={data}", f"eval.pipeline={model}", *measured),
        *("eval.zero_shot=[]", "eval.vae=null", f"eval.clip={runs / 'demo-clip/model'}", f"eval.sampling={sampling}"),
        *("--out", str(folder / "eval")),
    )


def ldm(*arguments: str) -> str:
    """The output of a command that must succeed."""
    command = [sys.executable, "-m", "ldm_cli", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def figures(one: Generator, runs: Path, out: Path) -> list[str]:
    """The cells of a row."""
    folder = out / one.key
    result = json.loads((folder / "eval/eval.json").read_text())["metrics"]
    found = result.get("pipeline", result)
    right = found["attribute_accuracy"]["generated"]["all"]
    low, high = share_interval(right["shape_and_color"], right["num_single"])
    distance = found["frechet_distance"]
    value = next(number for name, number in distance.items() if re.fullmatch(r"fd\[.*\]", name))
    interval = next((number for name, number in distance.items() if name.endswith("_interval")), None)
    between = "" if interval is None else f" [{interval[0]:.1f}, {interval[1]:.1f}]"
    parameters = sum(tensor.numel() for model in networks(runs / one.model) for tensor in model.parameters())
    seconds = sum(map(training_seconds, (runs / run for run in one.runs)))
    sampled = json.loads((folder / "sample.json").read_text())
    return [
        f"{right['shape_and_color']:.0%} [{low:.0%}, {high:.0%}]",
        f"{value:.1f}{between}",
        f"{parameters / 1e6:.1f} M",
        f"{seconds:,.0f}",
        f"{len(PROMPTS) * _SEEDS / sampled['seconds']:.2f}",
    ]


def networks(model: Path) -> Sequence[Any]:
    """All networks that a picture passes through, without their values."""
    return list(outline_family(resolve_model(model)).values())


def training_seconds(run: Path) -> float:
    """Seconds that the steps of a run took, times the processes; saving and validation are not among them."""
    seconds, before, batch = 0.0, 0, batch_size(run)
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        if rate := line.get("images_per_second"):
            seconds += (line["step"] - before) * batch / rate
            before = line["step"]
    return seconds * _PROCESSES


def batch_size(run: Path) -> int:
    """Images of a step."""
    recipe: dict[str, Any] = json.loads((run / "recipe.resolved.yaml").read_text())
    return int(recipe.get("recipe", recipe)["train"]["batch_size"])


def pictures(one: Generator, out: Path) -> list[Image.Image]:
    """Seed by seed, each with all prompts."""
    listed = json.loads((out / one.key / "sample.json").read_text())["images"]
    files = {(image["prompt"], image["seed"]): Path(image["file"]) for image in listed}
    seeds = sorted({seed for _, seed in files})
    return [enlarged(files[prompt, seed]) for seed in seeds for prompt in PROMPTS]


def enlarged(file: Path) -> Image.Image:
    """A picture of the sheet's size, without smoothing."""
    with Image.open(file) as opened:
        return opened.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.NEAREST)


def page(rows: Sequence[tuple[Generator, Sequence[str]]], missing: Sequence[Generator], out: Path) -> str:
    """The page as text, of generators with their `figures`."""
    absent = ", ".join(f"{escape(one.title)} (<code>make {one.target}</code>)" for one in missing)
    parts = {
        "LIGHT": "".join(f"--{name}:{value};" for name, value in LIGHT.items()),
        "DARK": "".join(f"--{name}:{value};" for name, value in DARK.items()),
        "COLUMNS": str(len(PROMPTS)),
        "HEADS": "".join(f"<th>{escape(head)}</th>" for head in _HEADS),
        "ROWS": "".join(
            f"<tr><td>{escape(one.title)}</td>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
            for one, cells in rows
        ),
        "NOTES": (
            "Shape and colour: the share of prompts with one object whose picture has both right. The Fréchet distance "
            "is that of the demo's CLIP. Parameters are those of all networks from text to picture. Processor seconds "
            f"are the time of all steps, times {_PROCESSES} processes: more on a busy machine. Pictures a second are "
            "those of one job, without loading."
        ),
        "MISSING": f"<p class='muted'>Not run yet: {absent}.</p>" if missing else "",
        "PROMPTS": "".join(f"<div>{escape(prompt)}</div>" for prompt in PROMPTS),
        "GENERATORS": "".join(section(one, out) for one, _ in rows),
    }
    return re.sub("@([A-Z]+)@", lambda match: parts[match[1]], _TEMPLATE.read_text(encoding="utf-8"))


def section(one: Generator, out: Path) -> str:
    """Heading and pictures of a generator."""
    images = "".join(f"<img alt='' src='{embedded(picture)}'>" for picture in pictures(one, out))
    return (
        f"<section><h2>{escape(one.title)}</h2><p>{escape(one.text)}</p><div class='pictures'>{images}</div></section>"
    )


def embedded(picture: Image.Image) -> str:
    """A picture as a data address."""
    content = io.BytesIO()
    picture.save(content, "WEBP", lossless=True)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"


def sheet(found: Sequence[Generator], out: Path) -> Image.Image:
    """One row a generator, one column a prompt: the first seed."""
    gap = 4
    step = _SIDE + gap
    whole = Image.new("RGB", (len(PROMPTS) * step - gap, len(found) * step - gap), LIGHT["paper"])
    for row, one in enumerate(found):
        for column, picture in enumerate(pictures(one, out)[: len(PROMPTS)]):
            whole.paste(picture, (column * step, row * step))
    return whole


if __name__ == "__main__":
    main()
