"""The text-encoder study: does a larger text encoder help pictures more than a larger denoiser?

`python benchmarks/study.py` trains all models by `ldm` commands, measures them and fills in docs/study.md. After an
interruption the same command goes on: finished parts do nothing. `--plan` prints the parts and their minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from safetensors import safe_open

from ldm_cli.plots.tradeoff import Curve, CurvePoint, Estimate, save_tradeoff

TOWERS = {"small": 32, "medium": 64, "large": 128}
"""Text towers by their width; all have two layers."""
UNETS = {"small": 16, "medium": 32, "large": 48}
"""U-Nets by the channels of their first level; the second has twice as many."""
AXES = {
    "text encoder": {size: f"tower-{size}-unet-medium" for size in TOWERS},
    "U-Net": {size: f"tower-medium-unet-{size}" for size in UNETS},
}
"""What varies → size → model."""
MINUTES = {
    "data": 0.3,
    "train-vae": 2.2,
    "train-clip": 2.8,
    "precompute": 0.4,
    "train-unet small": 1.2,
    "train-unet medium": 2.2,
    "train-unet large": 4.0,
    "eval": 6.0,
}
"""Kind of command → its time on two quiet cores, estimated from the parts of `make demo`."""
_T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}
"""Degrees of freedom → 97.5 % quantile of Student's t distribution."""
_MARK = "<!-- study-numbers -->", "<!-- /study-numbers -->"
_DOCS = Path(__file__).resolve().parent.parent / "docs"


@dataclass(frozen=True)
class Extent:
    """How much is trained and measured.

    Attributes:
        seeds: number of seeds, each with models of its own.
        scales: of guidance.
        processes: ranks of each command.
        changes: to the recipes of a command.
        data: options of `ldm data synth`.
    """

    seeds: int
    scales: tuple[float, ...]
    processes: int
    changes: Mapping[str, tuple[str, ...]]
    data: tuple[str, ...]


WHOLE = Extent(
    3,
    (1, 1.5, 2.5, 4, 6),
    2,
    {"eval": ("eval.num_samples=1000", "eval.num_generated=500")},
    ("--samples", "20000", "--val-samples", "1000"),
)
_TWO_STEPS = ("train.steps=2", "train.warmup_steps=1", "train.batch_size=8")
SMOKE = Extent(
    1,
    (1, 3),
    1,
    {
        "train-clip": _TWO_STEPS,
        "train-vae": _TWO_STEPS,
        "train-unet": (*_TWO_STEPS, "samples.sampling.steps=1"),
        "eval": ("eval.num_samples=8", "eval.num_generated=4", "eval.sampling.steps=2"),
    },
    ("--samples", "32", "--val-samples", "8"),
)
"""Few steps: shows that every command runs."""


@dataclass(frozen=True)
class Part:
    """One `ldm` command of the study.

    Attributes:
        kind: key of `MINUTES`.
        arguments: of `ldm`.
        cache: folder whose latents serve the command's own cache, `link_to`.
    """

    kind: str
    arguments: tuple[str, ...]
    cache: Path | None = None
    link_to: Path | None = None


def parts(root: Path, extent: Extent) -> Iterator[Part]:
    """The commands in their order, which write into `root`."""
    data = root / "data"
    shards = (f"data.shards={data}/train-*.tar", f"data.val_shards={data}/val-*.tar")

    def train(command: str, recipe: str, name: str, *changes: str, kind: str = "") -> Part:
        own = extent.changes.get(command, ())
        places = ("--out", str(root / name), "--nproc", str(extent.processes))
        return Part(kind or command, (command, recipe, *shards, *own, *changes, *places))

    synth = ("data", "synth", str(data), "--size", "32", "--two-object-fraction", "0.1", *extent.data)
    yield Part("data", synth)
    yield train("train-vae", "demo/vae", "vae")
    # The judge has another seed than every tower of the study, as well as another size of the text tower.
    yield train("train-clip", "demo/clip", "judge", "seed=1000")
    for seed in range(extent.seeds):
        for size, width in TOWERS.items():
            yield train("train-clip", "demo/clip", f"seed-{seed}/clip-{size}", f"seed={seed}", *_tower(width))
            yield _precompute(root, seed, size, extent, shards)
        for tower, unet in _pairs():
            changes = (*_unet(root, seed, tower, unet), f"cache={_cache(root, seed, tower)}", f"seed={seed}")
            name = f"seed-{seed}/tower-{tower}-unet-{unet}"
            yield train("train-unet", "demo/unet", name, *changes, kind=f"train-unet {unet}")
        yield _eval(root, seed, extent)


def _pairs() -> list[tuple[str, str]]:
    return [*((tower, "medium") for tower in TOWERS), *(("medium", unet) for unet in UNETS if unet != "medium")]


def _tower(width: int) -> tuple[str, ...]:
    return (f"clip.text_config.hidden_size={width}", f"clip.text_config.intermediate_size={4 * width}")


def _cache(root: Path, seed: int, tower: str) -> Path:
    return root / f"seed-{seed}/cache-{tower}"


def _unet(root: Path, seed: int, tower: str, unet: str) -> tuple[str, ...]:
    return (
        f"vae={root}/vae/model",
        f"text_encoder={root}/seed-{seed}/clip-{tower}/model",
        f"unet.cross_attention_dim={TOWERS[tower]}",
        f"unet.block_out_channels=[{UNETS[unet]},{2 * UNETS[unet]}]",
        "unet.norm_num_groups=8",
    )


def _precompute(root: Path, seed: int, tower: str, extent: Extent, shards: tuple[str, ...]) -> Part:
    cache = _cache(root, seed, tower)
    places = ("--out", str(cache), "--nproc", str(extent.processes))
    arguments = ("precompute", "demo/unet", *shards, *_unet(root, seed, tower, "medium"), *places)
    return Part("precompute", arguments, _cache(root, 0, next(iter(TOWERS))), cache)


def _eval(root: Path, seed: int, extent: Extent) -> Part:
    models = {f"tower-{tower}-unet-{unet}": f"{root}/seed-{seed}/tower-{tower}-unet-{unet}" for tower, unet in _pairs()}
    changes = (
        f"data.shards={root}/data/val-*.tar",
        f"eval.clip={root}/judge/model",
        "eval.vae=null",
        "eval.pipeline=null",
        f"eval.pipelines={json.dumps({name: f'{folder}/model' for name, folder in models.items()})}",
        "eval.metrics=[clip_score,frechet_distance,attribute_accuracy]",
        "eval.zero_shot=[]",
        f"eval.sweep={json.dumps({'guidance.scale': extent.scales})}",
        *extent.changes["eval"],
    )
    places = ("--out", str(root / f"seed-{seed}/eval"), "--nproc", str(extent.processes))
    return Part("eval", ("eval", "demo/eval", *changes, *places))


def run(part: Part) -> None:
    """Run a command; one that is finished does nothing.

    Raises:
        SystemExit: the command failed; with its exit status.
    """
    if part.cache is not None and part.link_to is not None and part.cache != part.link_to:
        _link_latents(part.cache, part.link_to)
    done = subprocess.run([sys.executable, "-m", "ldm_cli", *part.arguments], stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def _link_latents(source: Path, target: Path) -> None:
    """Let a cache begin with the latents of another, since the autoencoder is the same."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.glob("latents-*.tar"):
        if not (target / file.name).exists():
            os.link(file, target / file.name)


METRICS: Mapping[str, tuple[str, float, Callable[[Mapping[str, Any]], float]]] = {
    "distance": ("Fréchet distance", -1.0, lambda found: _distance(found["frechet_distance"])),
    "clip_score": ("CLIP score", 1.0, lambda found: float(found["clip_score"]["generated"]["clip_score"])),
    "accuracy": (
        "right",
        1.0,
        lambda found: float(found["attribute_accuracy"]["generated"]["all"]["shape_and_color"] or 0.0) * 100,
    ),
}
"""Number → its name in the table, 1 where more is better and -1 where less is, and how it is read from metrics."""


def _distance(found: Mapping[str, Any]) -> float:
    return next(float(value) for name, value in found.items() if name.startswith("fd[") and name.endswith("]"))


def read_results(root: Path, extent: Extent) -> list[dict[str, dict[float, dict[str, float]]]]:
    """For each seed: model → guidance scale → number → value."""
    seeds = []
    for seed in range(extent.seeds):
        found: dict[str, dict[float, dict[str, float]]] = {}
        for point in json.loads((root / f"seed-{seed}/eval/eval.json").read_bytes())["points"]:
            numbers = {name: read(point["metrics"]) for name, (_, _, read) in METRICS.items()}
            found.setdefault(point["pipeline"], {})[point["settings"]["guidance.scale"]] = numbers
        seeds.append(found)
    return seeds


def best(by_scale: Mapping[float, Mapping[str, float]], number: str) -> float:
    """The best value of a number over the guidance scales."""
    sign = METRICS[number][1]
    return sign * max(sign * numbers[number] for numbers in by_scale.values())


def gains(seeds: Sequence[Mapping[str, Mapping[float, Mapping[str, float]]]], axis: str, number: str) -> list[float]:
    """For each seed, by how much the largest model of an axis is better than the smallest."""
    models = list(AXES[axis].values())
    sign = METRICS[number][1]
    return [sign * (best(found[models[-1]], number) - best(found[models[0]], number)) for found in seeds]


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean by Student's t; None of fewer than two values, or more than eight."""
    if (factor := _T_975.get(len(values) - 1)) is None:
        return None
    half = factor * stdev(values) / math.sqrt(len(values))
    return mean(values) - half, mean(values) + half


def conclusion(differences: Sequence[float]) -> str:
    """Whether the encoder's gain exceeds the denoiser's.

    Args:
        differences: for each seed, the encoder's gain less the denoiser's.

    Returns:
        `confirmed` where the interval of the mean lies above 0, `refuted` where it lies below; else `undecided`.
    """
    found = interval(differences)
    if found is None or found[0] <= 0 <= found[1]:
        return "undecided"
    return "confirmed" if found[0] > 0 else "refuted"


def num_parameters(folder: Path) -> int:
    """Of a model folder."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total


def table(root: Path, seeds: Sequence[Mapping[str, Any]], extent: Extent) -> str:
    """The numbers in Markdown: a row for each model, and a row for each number of the conclusion."""
    titles = [title for title, _, _ in METRICS.values()]
    lines = [f"| text tower, U-Net | million weights | {' | '.join(titles)} |", "|---|---|" + "---|" * len(titles)]
    for tower, unet in _pairs():
        model = f"tower-{tower}-unet-{unet}"
        folder = root / f"seed-0/{model}/model"
        sizes = [num_parameters(folder / part) / 1e6 for part in ("text_encoder", "unet")]
        cells = [_spread([best(found[model], number) for found in seeds]) for number in METRICS]
        lines.append(f"| {tower}, {unet} | {sizes[0]:.2f}, {sizes[1]:.2f} | {' | '.join(cells)} |")
    lines += [
        "",
        "| gain | text encoder | U-Net | difference, 95 % | claim |",
        "|---|---|---|---|---|",
    ]
    for number, title in zip(METRICS, titles, strict=True):
        encoder, denoiser = (gains(seeds, axis, number) for axis in AXES)
        differences = [a - b for a, b in zip(encoder, denoiser, strict=True)]
        ends = interval(differences)
        shown = f"{mean(differences):.1f}" + (f" ({ends[0]:.1f} to {ends[1]:.1f})" if ends else "")
        lines.append(f"| {title} | {_spread(encoder)} | {_spread(denoiser)} | {shown} | {conclusion(differences)} |")
    scales = ", ".join(f"{scale:g}" for scale in extent.scales)
    lines += [
        "",
        "Gains are from the smallest model to the largest; *right* is the percentage of",
        f"scenes of one object with the right shape and colour. {extent.seeds} seeds, guidance",
        f"scales {scales}; ± is the standard deviation over seeds.",
    ]
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    return _number(mean(values)) + (f" ± {_number(stdev(values))}" if len(values) > 1 else "")


def _number(value: float) -> str:
    return f"{value:.2f}"


def save_plates(root: Path, seeds: Sequence[Mapping[str, Any]], extent: Extent) -> list[Path]:
    """One figure for each axis: a curve for each size, its points the means over seeds, its bars their range."""
    files = []
    for axis, models in AXES.items():
        curves = []
        for size, model in models.items():
            points = []
            for scale in extent.scales:
                x, y = ([found[model][scale][number] for found in seeds] for number in ("clip_score", "distance"))
                estimates = [Estimate(mean(values), (min(values), max(values))) for values in (x, y)]
                points.append(CurvePoint(f"{scale:g}", *estimates))
            curves.append(Curve(f"{size} {axis}", points))
        file = root / f"study-{axis.replace(' ', '-').lower()}"
        files += save_tradeoff(curves, "CLIP score (beside each point: guidance scale)", "Fréchet distance", file)
    return files


def publish(text: str, plates: Sequence[Path], docs: Path) -> None:
    """Put the table and the plates into docs/study.md, between its marks."""
    pictures = docs / "pictures"
    for plate in plates:
        shutil.copyfile(plate, pictures / plate.name)
    shown = [
        f"![a curve for each size of the {axis}](pictures/{plate.name})"
        for axis, plate in zip(AXES, (plate for plate in plates if plate.suffix == ".png"), strict=True)
    ]
    page = docs / "study.md"
    before, rest = page.read_text().split(_MARK[0])
    after = rest.split(_MARK[1])[1]
    page.write_text("\n".join([before + _MARK[0], text, "", *shown, _MARK[1] + after]))


def main() -> None:
    """Run the study, or print its plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true", help="print the commands and their minutes, and run none")
    parser.add_argument("--smoke", action="store_true", help="few steps, nothing published: that every command runs")
    parser.add_argument("--out", type=Path, default=None, help="folder; default: runs/study, or runs/study-smoke")
    given = parser.parse_args()
    extent = SMOKE if given.smoke else WHOLE
    root: Path = given.out or Path("runs", "study-smoke" if given.smoke else "study")
    steps = list(parts(root, extent))
    if given.plan:
        for part in steps:
            print(f"{MINUTES[part.kind]:4.1f} min  ldm {' '.join(part.arguments)}")
        print(f"{sum(MINUTES[part.kind] for part in steps):4.0f} min in all")
        return
    begun = time.monotonic()
    for number, part in enumerate(steps, 1):
        print(f"[{number}/{len(steps)}, {(time.monotonic() - begun) / 60:.1f} min] ldm {' '.join(part.arguments)}")
        run(part)
    seeds = read_results(root, extent)
    text, plates = table(root, seeds, extent), save_plates(root, seeds, extent)
    (root / "study.md").write_text(text + "\n")
    print(text)
    if not given.smoke:
        publish(text, plates, _DOCS)


if __name__ == "__main__":
    main()
