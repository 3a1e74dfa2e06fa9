"""`ldm bench SUBJECT`: measure, count operations, compare, and describe the machine."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from ldm_cli.bench import data, peers, stages
from ldm_cli.bench.machine import describe, matmul_gflops
from ldm_cli.bench.race import Contender, Turns, race, speed_and_memory
from ldm_cli.bench.stand_ins import is_complete, random_family, with_stand_ins
from ldm_cli.bench.workload import size_of
from ldm_cli.core.precision import precision_on
from ldm_cli.errors import UnavailableError, UsageError
from ldm_cli.families.open_family import open_family
from ldm_cli.recipe.load import load_recipe
from ldm_cli.recipe.schema import TrainUnetRecipe
from ldm_cli.recipe.train_recipe import TrainRecipe
from ldm_cli.reporting import Reporter
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.pipeline_of import pipeline_of
from ldm_cli.sampling.request import requests_for


@dataclass(frozen=True)
class Subject:
    """What is measured: the peer that does the same work, if any; the command whose recipes it takes, and the default
    one."""

    peer: str = ""
    command: str = ""
    recipe: str = ""


SUBJECTS = {
    "train-clip": Subject("transformers", "train-clip", "bench/clip"),
    "train-vae": Subject("diffusers", "train-vae", "bench/vae"),
    "train-unet": Subject("diffusers", "train-unet", "bench/unet"),
    "precompute": Subject("", "train-unet", "bench/unet"),
    "sample": Subject("diffusers", "train-unet", "bench/unet"),
    "data": Subject("webdataset"),
}
"""The single subjects; `all` measures each, `published` some of them at published sizes."""

_AT_ONCE = {"train.micro_batch": "null", "train.gradient_checkpointing": "false"}
_CACHED = {**_AT_ONCE, "train.batch_size": 32, "cache": "none", "data.image_size": 512, "unet.sample_size": 64}
"""Of U-Nets. There is no cache of this name: it is made of random data."""
PUBLISHED: tuple[tuple[str, str, Mapping[str, Any], int | None], ...] = (
    ("sample", "unet/sd15", {}, 1),
    ("sample", "unet/sd15", {}, 16),
    ("train-unet", "unet/sd15", _CACHED, None),
    ("train-unet", "unet/sd21", _CACHED, None),
    ("train-clip", "clip/vit-b-32", {**_AT_ONCE, "train.batch_size": 1024}, None),
    ("train-clip", "clip/vit-l-14", {**_AT_ONCE, "train.batch_size": 128}, None),
    ("precompute", "unet/sd15", {}, None),
)
"""Subject, recipe, changes to it and images; U-Nets train at 512 px from a cache, as in published measurements."""
_PUBLISHED_SECONDS = 480.0
"""Seconds after which no further measurement of published sizes begins, so that all take less than ten minutes."""
PROMPT, GUIDANCE = "a red circle", 7.5


@dataclass(frozen=True)
class BenchOptions:
    """The settings of a measurement.

    Attributes:
        against: peers to run beside us.
        rounds: turns of each contender.
        device: `cpu` or `cuda`.
        model: pipeline folder for `sample`; None: random weights.
        images: pictures of `sample`, or samples of `data`; None: 8 and 2,048.
        steps: denoising steps of `sample`.
    """

    against: frozenset[str] = frozenset()
    rounds: int = 5
    device: str = "cpu"
    model: str | None = None
    images: int | None = None
    steps: int = 50


def check_peers(subject: str, against: Sequence[str]) -> frozenset[str]:
    """The requested peers, if they exist, do this work and are installed.

    Raises:
        UsageError: no such peer, or it does not do this work.
        UnavailableError: it is not installed.
    """
    known = {each.peer for each in SUBJECTS.values()} - {""}
    useful = {SUBJECTS[subject].peer} - {""} if subject in SUBJECTS else known
    wanted = useful if "all" in against else set(against)
    if unknown := wanted - known:
        raise UsageError(f"unknown peer '{min(unknown)}'", remedy=f"--against takes {', '.join(sorted(known))} or all")
    if other := wanted - useful:
        remedy = f"use --against {min(useful)}" if useful else "leave out --against"
        raise UsageError(f"'{min(other)}' does not do the work of {subject}", remedy=remedy)
    for package in sorted(wanted):
        if importlib.util.find_spec(package) is None:
            remedy = f"pip install {package}, or leave out --against"
            raise UnavailableError(f"cannot run against '{package}'", "it is not installed", remedy)
    return frozenset(wanted)


def run(subject: str, recipes: Mapping[str, TrainRecipe], options: BenchOptions, reporter: Reporter) -> dict[str, Any]:
    """Measure one subject, or all.

    Args:
        subject: one of `SUBJECTS`, `published` or `all`.
        reporter: receives the name of each subject as it starts.

    Returns:
        `machine`, `matmul_gflops`, and the rows of each subject under its name.

    Raises:
        LdmError: a peer is missing, a process died, a recipe cannot be used.
    """
    device = torch.device(options.device)
    precision = next(iter(recipes.values())).train.precision if recipes else None
    gflops = matmul_gflops(device, precision_on(device, precision))
    result: dict[str, Any] = {"machine": describe(device), "matmul_gflops": gflops}
    if subject == "published":
        return result | published(options, gflops, reporter)
    for name in SUBJECTS if subject == "all" else [subject]:
        reporter.info(f"measuring {name}")
        result[name] = measure(name, recipes.get(name), options, gflops)
    return result


def published(options: BenchOptions, gflops: float, reporter: Reporter) -> dict[str, Any]:
    """Sampling, training steps and encoding of published sizes, as many as the time allows.

    Only sampling is compared, as the models and optimizers of two trainers would not fit into one device.

    Args:
        gflops: as in `measure`.
    """
    deadline, result = time.monotonic() + _PUBLISHED_SECONDS, {}
    for subject, recipe, changes, images in PUBLISHED:
        name = f"{subject} {recipe}" + (f", {images} at a time" if images else "")
        if time.monotonic() > deadline:
            reporter.warn(f"no time is left for {name}")
            continue
        reporter.info(f"measuring {name}")
        words = [f"{key}={value}" for key, value in changes.items()]
        loaded = load_recipe(recipe, words, expected_command=SUBJECTS[subject].command).recipe
        against = options.against if subject == "sample" else frozenset()
        own = BenchOptions(against, options.rounds, options.device, images=images, steps=options.steps)
        result[name] = measure(subject, cast("TrainRecipe", loaded), own, gflops)
    return result


def measure(subject: str, recipe: TrainRecipe | None, options: BenchOptions, gflops: float) -> list[dict[str, Any]]:
    """One row per contender: ours, and with its name in `options.against` the peer.

    Args:
        gflops: speed of a matrix product on this machine.
    """
    is_compared = SUBJECTS[subject].peer in options.against
    if recipe is None:
        return data.measure(options.images or 2048, options.rounds, is_compared)
    with tempfile.TemporaryDirectory() as scratch:
        if subject == "sample":
            return _sample(cast("TrainUnetRecipe", recipe), Path(scratch), options, is_compared)
        has_all = is_complete(recipe)
        if not has_all:
            num_images = stages.ENCODED_IMAGES * (options.rounds + 1) if subject == "precompute" else 256
            recipe = with_stand_ins(recipe, Path(scratch), options.device, num_images)
        work = stages.encode if subject == "precompute" else stages.train
        field = [Contender("ldm", work, (recipe, options.device))]
        if is_compared:
            field += _peers_of_training(subject, recipe, options.device)
        rows = speed_and_memory(race(field, rounds=options.rounds, device=options.device))
    if subject != "precompute":
        flops = size_of(recipe)[1]
        for row in rows:
            row |= {"gflop_per_unit": flops / 1e9, "fraction_of_matmul": row["per_second"] * flops / 1e9 / gflops}
    return [row | {"data": "the recipe's" if has_all else "random"} for row in rows]


def _peers_of_training(subject: str, recipe: TrainRecipe, device: str) -> list[Contender]:
    """The peer as it comes, in channels-last order, and compiled if ours is."""
    peer, has_convolutions = SUBJECTS[subject].peer, subject != "train-clip"
    field = [Contender(peer, peers.train, (recipe, device))]
    if has_convolutions:
        field.append(Contender(f"{peer} channels_last", peers.train, (recipe, device, True)))
    if recipe.train.compile is True or (recipe.train.compile == "auto" and device == "cuda"):
        field.append(Contender(f"{peer} compiled", peers.train, (recipe, device, has_convolutions, True)))
    return field


def _sample(recipe: TrainUnetRecipe, scratch: Path, options: BenchOptions, is_compared: bool) -> list[dict[str, Any]]:
    """Pictures of one prompt, DDIM, guidance 7.5, in a process with a loaded model; on CUDA also compiled."""
    folder, images = options.model or str(scratch / "model"), options.images or 8
    if options.model is None:
        random_family(recipe).save(Path(folder))
    field = []
    for is_compiled in (False, True) if options.device == "cuda" else (False,):
        arguments, suffix = (folder, images, options.steps, options.device, is_compiled), " compiled" * is_compiled
        field.append(Contender(f"ldm{suffix}", generate, arguments))
        if is_compared:
            field.append(Contender(f"diffusers{suffix}", peers.generate, (*arguments, PROMPT, GUIDANCE)))
    return speed_and_memory(race(field, rounds=options.rounds, device=options.device))


def generate(turns: Turns, folder: str, images: int, steps: int, device: str, compiled: bool) -> None:
    """Our pipeline, loaded, as `ldm sample` runs it; a turn generates all pictures."""
    precision = "fp32" if device == "cpu" else "fp16"
    settings = {"sampler": "ddim", "steps": steps, "guidance": GUIDANCE, "images_per_prompt": images}
    config = SamplingConfig.from_mapping(settings | {"batch_size": min(images, 16), "precision": precision})
    pipeline = pipeline_of(open_family(Path(folder), device, precision, compiled=compiled))
    turns.repeat(images, lambda: [*pipeline.generate(requests_for([PROMPT], config), config)])
