"""What helps a small denoiser: ways to train it, each for equal processor seconds.

`python benchmarks/ablations.py` trains all models by `ldm` commands, measures them and fills in docs/ablations.md.
After an interruption the same command goes on: finished parts do nothing. `--plan` prints the parts and their minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

SECONDS = 215.0
"""Processor seconds of each training, over both processes."""
MINUTES = {
    "data": 0.3,
    "train-vae": 2.5,
    "train-clip": 2.6,
    "precompute": 0.5,
    "calibration": 0.6,
    "train-unet": SECONDS / 60 / 2 + 0.2,
    "eval": 2.8,
}
"""Kind of command → its time on two quiet cores, estimated from the parts of `make demo` and `make demo-sd3`."""
_CALIBRATION = 4, 24
"""Steps of two short runs, whose difference is free of what happens once in a run. A fifth of either is the part of a
run in which no patch is left out."""
_REPEATS = 2
_WRAPPED: dict[str, Any] = {"subsequent_indent": "  ", "break_on_hyphens": False}
_NUM_LEVELS = 5
_UNET = ("unet.in_channels=16", "unet.out_channels=16", "unet.block_out_channels=[64,128]")
"""The U-Net of the demo at twice its width, on the latents of the transformer."""
_MARK = "<!-- ablations-numbers -->", "<!-- /ablations-numbers -->"
_DOCS = Path(__file__).resolve().parent.parent / "docs"
PLAIN = "plain flow"


@dataclass(frozen=True)
class Extent:
    """How much is trained and measured.

    Attributes:
        seeds: number of seeds; each trains every variant.
        processes: ranks of each command.
        max_steps: of a training, whatever its steps cost.
        data: options of `ldm data synth`.
        changes: to the recipes of a command.
    """

    seeds: int
    processes: int
    max_steps: int
    data: tuple[str, ...]
    changes: Mapping[str, tuple[str, ...]]


WHOLE = Extent(
    3,
    2,
    10_000,
    ("--samples", "20000", "--val-samples", "1000"),
    {"eval": ("eval.num_samples=1000", "eval.num_generated=256")},
)
_FEW = ("train.warmup_steps=1", "train.batch_size=8", "train.validation_samples=8")
SMOKE = Extent(
    1,
    1,
    2,
    ("--samples", "32", "--val-samples", "8"),
    {
        "train-clip": ("train.steps=2", "train.warmup_steps=1", "train.batch_size=8"),
        "train-vae": ("train.steps=2", "train.warmup_steps=1", "train.batch_size=8"),
        "train-unet": (*_FEW, "samples.sampling.steps=1"),
        "eval": ("eval.num_samples=8", "eval.num_generated=4", "eval.sampling.steps=2"),
    },
)
"""Few steps: shows that every command runs."""


def variants(root: Path) -> dict[str, tuple[str, ...]]:
    """Name in the table → recipe, and what differs from the plain one."""
    return {
        PLAIN: ("sd3/demo",),
        "logit-normal levels": ("sd3/demo", "diffusion.timestep_sampling=logit_normal"),
        # A cache has no images, which REPA looks at.
        "REPA": ("sd3/demo", f"patches.clip={root}/clip/model", "cache=null"),
        "patches left out": ("sd3/demo", "patches.left_out=0.75"),
        "AdamW": ("sd3/demo", "train.optimizer=adamw", "train.lr=1e-3"),
        "U-Net, min-SNR": ("demo/unet", *_UNET, "diffusion.snr_gamma=5"),
    }


@dataclass(frozen=True)
class Part:
    """One `ldm` command, or the calibration of a variant.

    Attributes:
        kind: key of `MINUTES`.
        arguments: of `ldm`; of a training without its number of steps.
        variant: that is trained; empty: none.
    """

    kind: str
    arguments: tuple[str, ...]
    variant: str = ""


def parts(root: Path, extent: Extent) -> Iterator[Part]:
    """The commands in their order, which write into `root`."""
    shards = (f"data.shards={root}/data/train-*.tar", f"data.val_shards={root}/data/val-*.tar")
    ranks = ("--nproc", str(extent.processes))

    def train(command: str, recipe: str, name: str, *changes: str) -> Part:
        own = (*shards, *extent.changes.get(command, ()), *changes)
        return Part(command, (command, recipe, *own, "--out", str(root / name), *ranks))

    yield Part("data", ("data", "synth", f"{root}/data", "--size", "32", "--two-object-fraction", "0.1", *extent.data))
    yield train("train-vae", "sd3/demo-vae", "vae")
    yield train("train-clip", "demo/clip", "clip")
    yield train("train-clip", "sd3/demo-clip", "clip-2")
    # The judge has another seed than the text encoders, and than the tower whose features are aligned.
    yield train("train-clip", "demo/clip", "judge", "seed=1000")
    own: tuple[str, ...]
    for recipe, own in (("sd3/demo", ()), ("demo/unet", _UNET)):
        places = ("--out", str(_cache(root, recipe)), *ranks)
        yield Part("precompute", ("precompute", recipe, *_inputs(root, recipe), *own, *places))
    for variant, (recipe, *changes) in variants(root).items():
        yield Part("calibration", ("train-unet", recipe, *_training(root, recipe, extent), *changes, *ranks), variant)
    for seed in range(extent.seeds):
        for variant, (recipe, *changes) in variants(root).items():
            places = ("--out", str(_folder(root, seed, variant)), *ranks)
            own = (*_training(root, recipe, extent), *changes, f"seed={seed}")
            yield Part("train-unet", ("train-unet", recipe, *own, *places), variant)
        yield _eval(root, seed, extent)


def _inputs(root: Path, recipe: str) -> tuple[str, ...]:
    """The data and the trained models."""
    second = (f"text_encoder_2={root}/clip-2/model",) if recipe.startswith("sd3") else ()
    return (
        *(f"data.shards={root}/data/train-*.tar", f"data.val_shards={root}/data/val-*.tar"),
        *(f"vae={root}/vae/model", f"text_encoder={root}/clip/model", *second),
    )


def _cache(root: Path, recipe: str) -> Path:
    return root / "cache" / recipe.replace("/", "-")


def _training(root: Path, recipe: str, extent: Extent) -> tuple[str, ...]:
    """What all variants share: data, models, Muon, levels alike."""
    return (
        *_inputs(root, recipe),
        *(f"cache={_cache(root, recipe)}", "diffusion.timestep_sampling=uniform", "train.sample_every=100000"),
        *extent.changes.get("train-unet", ()),
    )


def _folder(root: Path, seed: int, variant: str) -> Path:
    """Of a trained model; the last part of the path is its name in an evaluation, too."""
    return root / f"seed-{seed}" / variant.lower().replace(",", "").replace(" ", "-")


def _eval(root: Path, seed: int, extent: Extent) -> Part:
    folders = [_folder(root, seed, variant) for variant in variants(root)]
    changes = (
        f"data.shards={root}/data/val-*.tar",
        f"eval.clip={root}/judge/model",
        *("eval.vae=null", "eval.pipeline=null", "eval.zero_shot=[]"),
        f"eval.pipelines={json.dumps({folder.name: f'{folder}/model' for folder in folders})}",
        "eval.metrics=[frechet_distance,attribute_accuracy]",
        f"eval.sweep={json.dumps({'guidance.scale': [2.5]})}",
        *extent.changes["eval"],
    )
    places = ("--out", str(root / f"seed-{seed}/eval"), "--nproc", str(extent.processes))
    return Part("eval", ("eval", "demo/eval", *changes, *places))


def run(part: Part, root: Path, extent: Extent) -> None:
    """Run a part; one that is finished does nothing.

    Raises:
        SystemExit: the command failed; with its exit status.
    """
    if part.kind == "calibration":
        calibrate(part, root)
    elif part.variant:
        command, recipe, *rest = part.arguments
        _ldm(command, recipe, f"train.steps={num_steps(root, part.variant, extent)}", *rest)
    else:
        _ldm(*part.arguments)


def _ldm(*arguments: str) -> float:
    """Run a command; returns the processor seconds that it took, with its processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "ldm_cli", *arguments]
    # One thread for each of the processes.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.DEVNULL, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def calibrate(part: Part, root: Path) -> None:
    """Measure the processor seconds of a step, once."""
    file = root / "calibration.json"
    known: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}
    if part.variant in known:
        return
    folder = root / "calibration"

    def spent(steps: int) -> float:
        shutil.rmtree(folder, ignore_errors=True)
        return _ldm(*part.arguments, f"train.steps={steps}", "train.warmup_steps=1", "--out", str(folder))

    few, many = _CALIBRATION
    # Other processes of the machine can only add to the time.
    less, more = (min(spent(steps) for _ in range(_REPEATS)) for steps in _CALIBRATION)
    shutil.rmtree(folder)
    known[part.variant] = max(1e-3, (more - less) / (many - few))
    file.write_text(json.dumps(known, indent=1) + "\n")


def num_steps(root: Path, variant: str, extent: Extent) -> int:
    """Steps that take `SECONDS`."""
    per_step = json.loads((root / "calibration.json").read_text())[variant]
    return min(extent.max_steps, max(2, round(SECONDS / float(per_step))))


def read_results(root: Path, extent: Extent) -> list[dict[str, dict[str, float]]]:
    """For each seed: variant → number → value."""
    seeds = []
    for seed in range(extent.seeds):
        points = json.loads((root / f"seed-{seed}/eval/eval.json").read_bytes())["points"]
        by_name = {point["pipeline"]: point["metrics"] for point in points}
        found = {}
        for variant in variants(root):
            folder = _folder(root, seed, variant)
            metrics = by_name[folder.name]
            lines = (folder / "metrics.jsonl").read_text().splitlines()
            losses = [line for line in map(json.loads, lines) if "val_loss" in line][-1]
            found[variant] = {
                **{f"level{i}": float(losses[f"val_loss/level{i}"]) for i in range(_NUM_LEVELS)},
                "distance": _distance(metrics["frechet_distance"]),
                "accuracy": 100 * float(metrics["attribute_accuracy"]["generated"]["all"]["shape_and_color"] or 0.0),
            }
        seeds.append(found)
    return seeds


def _distance(found: Mapping[str, Any]) -> float:
    return next(float(value) for name, value in found.items() if name.startswith("fd[") and name.endswith("]"))


def table(root: Path, seeds: Sequence[Mapping[str, Mapping[str, float]]], extent: Extent) -> str:
    """The numbers in Markdown: a row for each variant, and a row for the losses of each flow."""
    measured = {"distance": ("Fréchet distance", -1.0), "accuracy": ("shape and colour right, %", 1.0)}
    lines = [f"| variant | steps | {' | '.join(title for title, _ in measured.values())} |", "|---|---|---|---|"]
    for variant in seeds[0]:
        cells = [_spread([found[variant][name] for found in seeds]) for name in measured]
        lines.append(f"| {variant} | {num_steps(root, variant, extent):,} | {' | '.join(cells)} |")
    lines += [""]
    for name, (title, sign) in measured.items():
        lines += textwrap.wrap(f"- {title}: {verdicts(seeds, name, sign)}", 80, **_WRAPPED)
    levels = [f"{(i + 0.5) / _NUM_LEVELS:g}" for i in range(_NUM_LEVELS)]
    lines += ["", f"| loss × 1,000 at u = | {' | '.join(levels)} |", "|---" * (1 + _NUM_LEVELS) + "|"]
    # The loss of the U-Net is that of another prediction, weighted.
    for variant in (name for name in seeds[0] if not name.startswith("U-Net")):
        cells = [_spread([1000 * found[variant][f"level{i}"] for found in seeds], 0) for i in range(_NUM_LEVELS)]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    about = f"{extent.seeds} seeds, {SECONDS:g} processor seconds each; ± is the standard deviation over seeds."
    return "\n".join([*lines, "", *textwrap.wrap(about, 80)])


def verdicts(seeds: Sequence[Mapping[str, Mapping[str, float]]], number: str, sign: float) -> str:
    """Which variants are better than the plain one with every seed, and which are worse.

    Args:
        seeds: as `read_results` gives them.
        number: that is compared.
        sign: 1 where more is better, -1 where less is.
    """
    better, worse = [], []
    for variant in (name for name in seeds[0] if name != PLAIN):
        gains = [sign * (found[variant][number] - found[PLAIN][number]) for found in seeds]
        better += [variant] if min(gains) > 0 else []
        worse += [variant] if max(gains) < 0 else []
    text = f"better than {PLAIN} with every seed: {'; '.join(better) or 'none'}."
    return f"{text} Worse with every seed: {'; '.join(worse) or 'none'}."


def _spread(values: Sequence[float], digits: int = 1) -> str:
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def publish(text: str, docs: Path) -> None:
    """Put the table into docs/ablations.md, between its marks."""
    page = docs / "ablations.md"
    before, rest = page.read_text().split(_MARK[0])
    after = rest.split(_MARK[1])[1]
    page.write_text("\n".join([before + _MARK[0], text, _MARK[1] + after]))


def main() -> None:
    """Run the study, or print its plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true", help="print the commands and their minutes, and run none")
    parser.add_argument("--smoke", action="store_true", help="few steps, nothing published: that every command runs")
    parser.add_argument("--out", type=Path, default=None, help="folder; default: runs/ablations, or …-smoke")
    given = parser.parse_args()
    extent = SMOKE if given.smoke else WHOLE
    root: Path = given.out or Path("runs", "ablations-smoke" if given.smoke else "ablations")
    steps = list(parts(root, extent))
    if given.plan:
        for part in steps:
            print(f"{MINUTES[part.kind]:4.1f} min  {part.kind} ldm {' '.join(part.arguments)}")
        print(f"{sum(MINUTES[part.kind] for part in steps):4.0f} min in all")
        return
    begun = time.monotonic()
    for number, part in enumerate(steps, 1):
        print(
            f"[{number}/{len(steps)}, {(time.monotonic() - begun) / 60:.1f} min] {part.kind} {part.variant}", flush=True
        )
        run(part, root, extent)
    text = table(root, read_results(root, extent), extent)
    (root / "ablations.md").write_text(text + "\n")
    print(text)
    if not given.smoke:
        publish(text, _DOCS)


if __name__ == "__main__":
    main()
