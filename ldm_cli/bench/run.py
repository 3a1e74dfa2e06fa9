"""`ldm bench SUBJECT`: measure, count operations, compare, and describe the machine."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from ldm_cli.bench import input_pipeline, peers, picture
from ldm_cli.bench.machine import describe, matmul_gflops
from ldm_cli.bench.race import Contender, race, speed_and_memory
from ldm_cli.bench.workload import TrainRecipe, Workload, our_encoding, our_step, with_known_ids
from ldm_cli.core.precision import precision_on
from ldm_cli.errors import UnavailableError, UsageError
from ldm_cli.recipe.load import load_recipe
from ldm_cli.reporting import Reporter


@dataclass(frozen=True)
class Subject:
    """What is measured: the peer that does the same work; of a model, the command and its default recipe."""

    peer: str
    command: str = ""
    recipe: str = ""


SUBJECTS = {
    "train-clip": Subject("transformers", "train-clip", "bench/clip"),
    "train-vae": Subject("diffusers", "train-vae", "bench/vae"),
    "encode-vae": Subject("diffusers", "train-vae", "bench/vae"),
    "train-unet": Subject("diffusers", "train-unet", "bench/unet"),
    "sample": Subject("diffusers"),
    "data": Subject("webdataset"),
    "start": Subject("diffusers"),
}
"""The single subjects; `all` measures each, `published` some of them at published sizes."""

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
_AT_ONCE = {"train.micro_batch": "null", "train.gradient_checkpointing": "false"}
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
        steps: denoising steps of `sample` and `start`.
        compiled: whether each contender, ours or a peer, also runs compiled where possible.
    """

    against: frozenset[str] = frozenset()
    rounds: int = 5
    device: str = "cpu"
    context_length: int = 77
    model: str | None = None
    images: int | None = None
    steps: int = 50
    compiled: bool = False


def check_peers(subject: str, against: Sequence[str]) -> frozenset[str]:
    """The requested peers, if they exist, do this work and are installed.

    Raises:
        UsageError: no such peer, or it does not do this work.
        UnavailableError: it is not installed.
    """
    known = {each.peer for each in SUBJECTS.values()}
    useful = {SUBJECTS[subject].peer} if subject in SUBJECTS else known
    wanted = useful if "all" in against else set(against)
    if unknown := wanted - known:
        raise UsageError(f"unknown peer '{min(unknown)}'", remedy=f"--against takes {', '.join(sorted(known))} or all")
    if other := wanted - useful:
        raise UsageError(f"'{min(other)}' does not do the work of {subject}", remedy=f"use --against {min(useful)}")
    for package in sorted(wanted):
        if importlib.util.find_spec(package) is None:
            remedy = f"pip install {package}, or leave out --against"
            raise UnavailableError(f"cannot run against '{package}'", "it is not installed", remedy)
    return frozenset(wanted)


def run(subject: str, recipes: Mapping[str, TrainRecipe], options: BenchOptions, reporter: Reporter) -> dict[str, Any]:
    """Measure one subject, or all.

    Args:
        subject: one of `SUBJECTS`, `published` or `all`.
        recipes: subject → recipe of a model.
        options: the settings.
        reporter: receives the name of each subject as it starts.

    Returns:
        `machine`, `matmul_gflops`, and the rows of each subject under its name.

    Raises:
        LdmError: a peer is missing, a process died, a recipe cannot be used.
    """
    device = torch.device(options.device)
    precision = next(iter(recipes.values())).train.precision if recipes else "fp32"
    gflops = matmul_gflops(device, "bf16" if subject == "published" else precision_on(device, precision))
    result: dict[str, Any] = {"machine": describe(device), "matmul_gflops": gflops}
    if subject == "published":
        return result | published(options, gflops, reporter)
    for name in SUBJECTS if subject == "all" else [subject]:
        reporter.info(f"measuring {name}")
        result[name] = _measure(name, recipes.get(name), options, gflops)
    return result


def _measure(subject: str, recipe: TrainRecipe | None, options: BenchOptions, gflops: float) -> list[dict[str, Any]]:
    compared = SUBJECTS[subject].peer in options.against
    if recipe is not None:
        return compare(subject, recipe, options, gflops, compared)
    if subject == "data":
        return input_pipeline.measure(options.images or 2048, options.rounds, compared)
    with nullcontext(options.model) if options.model else picture.random_pipeline() as folder:
        if subject == "start":
            return picture.start(folder, options.steps, options.rounds, compared)
        return _sample(folder, options.images or 8, options, compared)


def _sample(folder: str, images: int, options: BenchOptions, compared: bool) -> list[dict[str, Any]]:
    return picture.sample(folder, images, options.steps, options.rounds, compared, options.device, options.compiled)


def published(options: BenchOptions, gflops: float, reporter: Reporter) -> dict[str, Any]:
    """Sampling, training steps and encoding of published sizes, as many as the time allows.

    Only sampling is compared, as the models and optimizers of two trainers would not fit into one device.

    Args:
        gflops: as in `compare`.
    """
    deadline, result = time.monotonic() + _PUBLISHED_SECONDS, {}

    def begins(name: str) -> bool:
        if time.monotonic() > deadline:
            reporter.warn(f"no time is left for {name}")
            return False
        reporter.info(f"measuring {name}")
        return True

    with picture.random_pipeline(*PUBLISHED_PIPELINE) as folder:
        for n in _PUBLISHED_PICTURES:
            if begins(f"sample {n}"):
                result[f"sample {n}"] = _sample(folder, n, options, "diffusers" in options.against)
    for subject, recipe, changes in PUBLISHED:
        if begins(name := f"{subject} {recipe}"):
            words = [f"{key}={value}" for key, value in {**_AT_ONCE, **changes}.items()]
            loaded: Any = load_recipe(recipe, words, expected_command=SUBJECTS[subject].command).recipe
            result[name] = compare(subject, loaded, options, gflops, compared=False)
    return result


def compare(
    subject: str, recipe: TrainRecipe, options: BenchOptions, gflops: float, compared: bool
) -> list[dict[str, Any]]:
    """One row per contender: ours; with `compared` the peer in its default and in channels-last order; with
    `options.compiled` ours compiled, and the peer compiled in its best order.

    Args:
        gflops: speed of a matrix product on this machine.
    """
    recipe, peer = with_known_ids(recipe), SUBJECTS[subject].peer
    work = Workload(recipe, options.device, options.context_length)
    ours, theirs = (our_encoding, peers.their_encoding) if subject == "encode-vae" else (our_step, peers.their_step)
    field = [Contender("ldm", ours, (work,))]
    if compared:
        field.append(Contender(peer, theirs, (work,)))
        if subject != "train-clip":  # CLIP has almost no convolutions
            field.append(Contender(f"{peer} channels_last", theirs, (work, True)))
    if options.compiled and subject != "encode-vae":
        train = recipe.train.model_copy(update={"compile": True})
        work = replace(work, recipe=recipe.model_copy(update={"train": train}))
        field.append(Contender("ldm compiled", ours, (work,)))
        if compared:
            field.append(Contender(f"{peer} compiled", theirs, (work, subject != "train-clip")))
    laps = race(field, rounds=options.rounds, device=options.device)
    flops, rows = laps["ldm"].facts["flops"], []
    for name, lap in laps.items():
        row = speed_and_memory(name, lap, laps["ldm"]) | {"gflop_per_unit": flops / lap.units / 1e9}
        row["fraction_of_matmul"] = flops / median(lap.seconds) / 1e9 / gflops
        rows.append(row | {key: value for key, value in lap.facts.items() if key == "first_loss"})
    return rows
