"""How a training step's time grows with batch, tokens, image side and width: python benchmarks/growth.py

The growth of counted operations stands beside it. The result is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression, median
from typing import Any, cast

from ldm_cli.bench import stages
from ldm_cli.bench.race import Contender, Turns, race
from ldm_cli.bench.stand_ins import CONTEXT_LENGTH, with_stand_ins
from ldm_cli.bench.workload import size_of
from ldm_cli.recipe.load import load_recipe
from ldm_cli.recipe.train_recipe import TrainRecipe


@dataclass(frozen=True)
class Axis:
    """The quantity that one series varies.

    Attributes:
        against: name of the abscissa; `parameters` are counted, all others follow from `size`.
        values: at least two.
        changes: changes to the recipe for a value.
        size: abscissa of a value; unused for `parameters`.
        tokens: text tokens per picture of a U-Net for a value.
    """

    against: str
    values: tuple[int, ...]
    changes: Callable[[int], Sequence[str]]
    size: Callable[[int], int] = int
    tokens: Callable[[int], int] = lambda _: CONTEXT_LENGTH


@dataclass(frozen=True)
class Work:
    """The series of a trainer: the recipe and changes that all points share, and the axes."""

    recipe: str
    changes: tuple[str, ...]
    axes: tuple[Axis, ...]


def _square(side: int) -> int:
    return side * side


def _batch(*sizes: int) -> Axis:
    return Axis("batch", sizes, lambda n: [f"train.batch_size={n}"])


def _towers(width: int) -> list[str]:
    towers = ("clip.text_config", "clip.vision_config")
    return [f"{t}.{field}" for t in towers for field in (f"hidden_size={width}", f"intermediate_size={4 * width}")]


def _image(side: int) -> list[str]:
    return [f"data.image_size={side}", f"clip.vision_config.image_size={side}"]


def _latent(side: int) -> list[str]:
    return [f"unet.sample_size={side}", f"data.image_size={4 * side}"]


def _levels(model: str) -> Callable[[int], list[str]]:
    return lambda width: [f"{model}.block_out_channels=[{width},{2 * width},{4 * width}]"]


WORKS: Mapping[str, Work] = {
    "train-unet": Work(
        "bench/unet",
        ("train.batch_size=8",),
        (
            _batch(4, 8, 16, 32),
            Axis("text tokens", (32, 77, 154, 308), lambda _: [], tokens=int),
            Axis("latent pixels", (8, 16, 24, 32), _latent, size=_square),
            Axis("parameters", (32, 64, 96, 128), _levels("unet")),
        ),
    ),
    "train-vae": Work(
        "bench/vae",
        ("train.batch_size=4", "data.image_size=32", "vae.norm_num_groups=16"),
        (
            _batch(2, 4, 8, 16),
            Axis("pixels", (16, 32, 48, 64), lambda side: [f"data.image_size={side}"], size=_square),
            Axis("parameters", (16, 32, 48, 64), _levels("vae")),
        ),
    ),
    "train-clip": Work(
        "bench/clip",
        ("train.batch_size=16",),
        (
            _batch(8, 16, 32, 64),
            Axis("text tokens", (16, 32, 64, 128), lambda n: [f"clip.text_config.max_position_embeddings={n}"]),
            Axis("pixels", (32, 64, 96, 128), _image, size=_square),
            Axis("parameters", (64, 128, 192, 256), _towers),
        ),
    ),
}
"""Trainer → its series, at sizes for a CPU; on a GPU, kernel launches would dominate such steps."""


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """p of the power law y ∝ x^p by least squares in logarithms: 1 is proportional, 0 does not grow."""
    return linear_regression([math.log(a) for a in x], [math.log(b) for b in y]).slope


def growth(rounds: int, device: str, works: Mapping[str, Work] = WORKS) -> list[dict[str, Any]]:
    """One row per series. The points of a series take turns, so that a disturbance affects all of them.

    Returns:
        For each series `work`, `against`, `points`; at each point `step_ms`, `cpu_ms` (medians) and `gflop` per step;
        `exponent` of time over size, `cpu_exponent` of processor time, `gflop_exponent` of operations over size,
        `exponent_by_gflop` of time over operations.
    """
    rows = []
    for name, work in works.items():
        for axis in work.axes:
            print(f"measuring {name} against {axis.against}", file=sys.stderr)
            rows.append(_series(name, work, axis, rounds, device))
    return rows


def _series(name: str, work: Work, axis: Axis, rounds: int, device: str) -> dict[str, Any]:
    recipes = [_recipe(work, axis, value) for value in axis.values]
    field = [
        Contender(str(value), train, (recipe, device, axis.tokens(value)))
        for value, recipe in zip(axis.values, recipes, strict=True)
    ]
    results = race(field, rounds=rounds, device=device).values()
    sizes = [size_of(recipe, axis.tokens(value)) for value, recipe in zip(axis.values, recipes, strict=True)]
    points = [axis.size(value) for value in axis.values]
    if axis.against == "parameters":
        points = [parameters for parameters, _ in sizes]
    seconds = [median(lap.seconds / stages.STEPS for lap in laps) for laps in results]
    processor = [median(lap.cpu_seconds / stages.STEPS for lap in laps) for laps in results]
    gflop = [recipe.train.batch_size * flops / 1e9 for recipe, (_, flops) in zip(recipes, sizes, strict=True)]
    return {
        "work": name,
        "against": axis.against,
        "points": points,
        "step_ms": [round(1e3 * value, 1) for value in seconds],
        "cpu_ms": [round(1e3 * value, 1) for value in processor],
        "gflop": [round(value, 2) for value in gflop],
        "exponent": exponent(points, seconds),
        "cpu_exponent": exponent(points, processor),
        "gflop_exponent": exponent(points, gflop),
        "exponent_by_gflop": exponent(gflop, seconds),
    }


def train(turns: Turns, recipe: TrainRecipe, device: str, context_length: int) -> None:
    """The trainer of a recipe, on random data."""
    with tempfile.TemporaryDirectory() as scratch:
        stages.train(turns, with_stand_ins(recipe, Path(scratch), device, context_length=context_length), device)


def _recipe(work: Work, axis: Axis, value: int) -> TrainRecipe:
    return cast("TrainRecipe", load_recipe(work.recipe, [*work.changes, *axis.changes(value)]).recipe)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="steps of each point")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    given = parser.parse_args()
    print(json.dumps(growth(given.rounds, given.device), indent=2))
