"""`ldm bench SUBJECT`: measure, count operations, compare, and describe the machine."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ldm_cli.bench import growth, input_pipeline, memory, peers, picture
from ldm_cli.bench.machine import ceiling, describe
from ldm_cli.bench.race import Contender, Lap, race, speedup
from ldm_cli.bench.workload import TrainRecipe, Workload, our_encoding, our_step, with_known_ids
from ldm_cli.errors import UsageError
from ldm_cli.recipe.load import load_recipe
from ldm_cli.reporting import Reporter

PEERS = {
    "train-clip": "transformers",
    "train-vae": "diffusers",
    "encode-vae": "diffusers",
    "train-unet": "diffusers",
    "sample": "diffusers",
    "data": "webdataset",
    "start": "diffusers",
}
"""Subject → the peer that does the same work."""
SUBJECTS = (*PEERS, "growth", "memory", "published", "all")
RECIPES = {"train-clip": "bench/clip", "train-vae": "bench/vae", "encode-vae": "bench/vae", "train-unet": "bench/unet"}
"""Subject → default recipe."""
COMMANDS = {"train-clip": "train-clip", "train-vae": "train-vae", "encode-vae": "train-vae", "train-unet": "train-unet"}
"""Subject → command of its recipes."""

PUBLISHED = (
    ("train-unet", "unet/sd15", {"train.batch_size": 32}),
    ("train-unet", "unet/sd21", {"train.batch_size": 32, "unet.sample_size": 64}),
    ("train-clip", "clip/vit-b-32", {"train.batch_size": 1024}),
    ("train-clip", "clip/vit-l-14", {"train.batch_size": 128}),
    ("encode-vae", "vae/sd-vae", {"train.batch_size": 16, "data.image_size": 512}),
)
"""Training of published sizes: subject, recipe, changes to it; U-Nets at 512 px, as in published measurements."""
PUBLISHED_PIPELINE = ("unet/sd15", "vae/sd-vae")
"""Recipes of the U-Net and the autoencoder for sampling at a published size."""
_PUBLISHED_PICTURES = (1, 16)
_AT_ONCE = {"train.gradient_accumulation": 1, "train.gradient_checkpointing": "false"}
_PUBLISHED_SECONDS = 480.0
"""Seconds after which no further measurement of published sizes begins, so that all take less than ten minutes."""


@dataclass(frozen=True)
class BenchOptions:
    """The settings of a measurement.

    Attributes:
        against: peers to run beside us.
        rounds: turns of each contender.
        device: `cpu` or `cuda`.
        context_length: text tokens per picture of a U-Net.
        model: pipeline folder for `sample` and `start`; None: random weights.
        images: pictures of `sample`, or samples of `data`.
        steps: denoising steps of `sample`, or training steps of `memory`.
        compiled: whether each contender, ours or a peer, also runs compiled where possible.
    """

    against: frozenset[str] = frozenset()
    rounds: int = 5
    device: str = "cpu"
    context_length: int = 77
    model: str | None = None
    images: int | None = None
    steps: int | None = None
    compiled: bool = False


def check_peers(subject: str, against: Sequence[str]) -> frozenset[str]:
    """The requested peers, if they exist, do this work and are installed.

    Raises:
        UsageError: no such peer, or it does not do this work.
        UnavailableError: it is not installed.
    """
    known = set(PEERS.values())
    wanted = known if "all" in against else set(against)
    if unknown := wanted - known:
        raise UsageError(f"unknown peer '{min(unknown)}'", remedy=f"--against takes {', '.join(sorted(known))} or all")
    if subject in PEERS and "all" not in against and wanted - {PEERS[subject]}:
        other = min(wanted - {PEERS[subject]})
        raise UsageError(f"'{other}' does not do the work of {subject}", remedy=f"use --against {PEERS[subject]}")
    mine = {PEERS[subject]} & wanted if subject in PEERS else wanted
    for package in sorted(mine):
        peers.require(package)
    return frozenset(mine)


def run(subject: str, recipes: Mapping[str, TrainRecipe], options: BenchOptions, reporter: Reporter) -> dict[str, Any]:
    """Measure one subject, or all.

    Args:
        subject: one of `SUBJECTS`.
        recipes: subject → recipe of a training subject.
        options: the settings.
        reporter: receives the name of each subject as it starts.

    Returns:
        `machine`, `ceiling`, and the figures of each subject under its name.

    Raises:
        LdmError: a peer is missing, a process died, a recipe cannot be used.
    """
    device = torch.device(options.device)
    precision = next(iter(recipes.values())).train.precision if recipes else "fp32"
    if subject == "published":
        precision = "bf16"
    result: dict[str, Any] = {"machine": describe(device), "ceiling": ceiling(device, precision)}
    if subject == "published":
        return result | published(options, result["ceiling"]["matmul"], reporter)
    subjects = list(PEERS) if subject == "all" else [subject]
    for name in subjects:
        reporter.info(f"measuring {name}")
        result[name] = _measure(name, recipes, options, result["ceiling"]["matmul"], reporter)
    return result


def _measure(
    subject: str, recipes: Mapping[str, TrainRecipe], options: BenchOptions, gflops: float, reporter: Reporter
) -> dict[str, Any] | list[dict[str, Any]]:
    compared = subject in PEERS and PEERS[subject] in options.against
    if subject in RECIPES:
        return compare(subject, recipes[subject], options, gflops, compared)
    others: dict[str, Callable[[], Any]] = {
        "sample": lambda: picture.sample(
            options.model,
            options.images or 8,
            options.steps or 50,
            options.rounds,
            compared,
            options.device,
            options.compiled,
        ),
        "start": lambda: picture.start(options.model, options.steps or 50, options.rounds, compared),
        "data": lambda: input_pipeline.measure(options.images or 2048, options.rounds, compared),
        "growth": lambda: growth.growth(options.rounds, options.device, reporter),
        "memory": lambda: memory.memory(options.steps or 2000, options.device, reporter),
    }
    return others[subject]()  # type: ignore[no-any-return]


def published(options: BenchOptions, gflops: float, reporter: Reporter) -> dict[str, Any]:
    """Sampling, training steps and encoding of published sizes, as many as the time allows.

    Only sampling is compared, as the models and optimizers of two trainers would not fit into one device.

    Args:
        gflops: as in `compare`.
    """

    def training(subject: str, recipe: str, changes: Mapping[str, Any]) -> list[dict[str, Any]]:
        words = [f"{key}={value}" for key, value in {**_AT_ONCE, **changes}.items()]
        loaded: Any = load_recipe(recipe, words, expected_command=COMMANDS[subject]).recipe
        return compare(subject, loaded, options, gflops, compared=False)

    steps, compared = options.steps or 50, "diffusers" in options.against
    deadline, result = time.monotonic() + _PUBLISHED_SECONDS, {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = picture.random_pipeline(Path(scratch) / "model", *PUBLISHED_PIPELINE)
        works: list[tuple[str, Callable[[], Any]]] = [
            (
                f"sample {n}",
                partial(picture.sample, folder, n, steps, options.rounds, compared, options.device, options.compiled),
            )
            for n in _PUBLISHED_PICTURES
        ]
        works += [(f"{work[0]} {work[1]}", partial(training, *work)) for work in PUBLISHED]
        for name, work in works:
            if time.monotonic() > deadline:
                reporter.warn(f"no time is left for {name}")
                continue
            reporter.info(f"measuring {name}")
            result[name] = work()
    return result


def compare(
    subject: str, recipe: TrainRecipe, options: BenchOptions, gflops: float, compared: bool
) -> list[dict[str, Any]]:
    """One row per contender: ours; with `compared` the peer in its default and in channels-last order; with
    `options.compiled` ours compiled, and the peer compiled in its best order.

    Args:
        gflops: speed of a matrix product on this machine.
    """
    recipe = with_known_ids(recipe)
    work = Workload(recipe, options.device, options.context_length)
    ours, theirs = (our_encoding, peers.their_encoding) if subject == "encode-vae" else (our_step, peers.their_step)
    field = [Contender("ldm", ours, (work,))]
    if compared:
        field.append(Contender(PEERS[subject], theirs, (work,)))
        if subject != "train-clip":  # CLIP has almost no convolutions
            field.append(Contender(f"{PEERS[subject]} channels_last", theirs, (work, True)))
    if options.compiled and subject != "encode-vae":
        train = recipe.train.model_copy(update={"compile": True})
        work = replace(work, recipe=recipe.model_copy(update={"train": train}))
        field.append(Contender("ldm compiled", ours, (work,)))
        if compared:
            field.append(Contender(f"{PEERS[subject]} compiled", theirs, (work, subject != "train-clip")))
    laps = race(field, rounds=options.rounds, device=options.device)
    return [row(name, lap, laps["ldm"], gflops) for name, lap in laps.items()]


def row(name: str, lap: Lap, ours: Lap, gflops: float) -> dict[str, Any]:
    """The figures of one contender; `speedup` and `memory_ratio` are ours against it."""
    units, flops = lap.facts["units"], ours.facts.get("flops")
    figures: dict[str, Any] = {
        "contender": name,
        "per_second": units / lap.median,
        "step_ms": 1e3 * lap.median,
        "cpu_ms": 1e3 * lap.cpu_median,
        "peak_mib": lap.peak_bytes / 2**20,
    }
    if flops:
        figures["gflop_per_unit"] = flops / units / 1e9
        figures["fraction_of_matmul"] = flops / lap.median / 1e9 / gflops
    if "first_loss" in lap.facts:
        figures["first_loss"] = lap.facts["first_loss"]
    figures["speedup"] = speedup(ours, lap)
    figures["memory_ratio"] = ours.peak_bytes / lap.peak_bytes
    return figures
