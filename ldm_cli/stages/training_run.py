"""What the three training commands share: open the data, own the run folder, hand a task to the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ldm_cli.data.bad_samples import BadSampleLog
from ldm_cli.data.loader import Batch, Loader, sequential_batches
from ldm_cli.data.shards import ShardSet, open_shards
from ldm_cli.errors import LdmError, Preempted
from ldm_cli.recipe.schema import TrainClipRecipe, TrainUnetRecipe, TrainVaeRecipe
from ldm_cli.reporting import Reporter
from ldm_cli.stages.options import RunOptions, resolve_device
from ldm_cli.training.loop import Task, train
from ldm_cli.training.run_folder import RunFolder

TrainRecipe = TrainClipRecipe | TrainVaeRecipe | TrainUnetRecipe


@dataclass(frozen=True)
class Workbench:
    """What a task is built from."""

    run: RunFolder
    shards: ShardSet
    held_out: tuple[Batch, ...]
    """The first `train.validation_samples` samples of `data.val_shards`, in their order; empty without them."""
    device: torch.device
    reporter: Reporter


def run_training(
    recipe: TrainRecipe,
    options: RunOptions,
    reporter: Reporter,
    build: Callable[[Workbench], Task[Batch]],
    *,
    with_captions: bool = True,
) -> dict[str, Any]:
    """Train, continue or recognise as finished the run `recipe` describes.

    Args:
        build: makes the task, with seeded initial weights (torch's generator is seeded and restored around it).
        with_captions: False reads images alone, so that shards without captions serve.

    Returns:
        `run`, `model`, `state`, `step` and the final figures.
    """
    device = resolve_device(options.device)
    shards = open_shards(recipe.data.shards, recipe.data, reporter)
    with RunFolder(options.out or Path("runs") / recipe.name, reporter) as run:
        run.claim(recipe.to_mapping(), options.recipe_text, shards.fingerprint)
        if (status := run.finished()) is not None:
            run.log(f"'{run.path}' is finished already: step {status['step']}")
            return _result(run, status["step"], status["figures"])
        try:
            held_out = tuple(_held_out(recipe, reporter, with_captions))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(recipe.seed)
                task = build(Workbench(run, shards, held_out, device, reporter))
            loader = Loader(
                shards,
                recipe.data,
                seed=recipe.seed,
                batch_size=recipe.train.batch_size,
                with_captions=with_captions,
                report_bad=BadSampleLog(run.path / "bad_samples.jsonl"),
            )
            figures = train(
                task,
                loader.batches,
                recipe.train,
                run,
                reporter,
                device=device,
                resume=options.resume,
                max_seconds=options.max_time,
                title=recipe.name,
            )
        except Preempted:
            raise
        except LdmError as error:
            run.status("failed", code=error.code, error=str(error))
            raise
        return _result(run, recipe.train.steps, figures)


def _held_out(recipe: TrainRecipe, reporter: Reporter, with_captions: bool) -> Iterator[Batch]:
    if recipe.data.val_shards is None:
        return
    shards = open_shards(recipe.data.val_shards, recipe.data, reporter)
    part = recipe.train.batch_size // recipe.train.gradient_accumulation
    limit = recipe.train.validation_samples
    yield from sequential_batches(shards, recipe.data, part, limit=limit, with_captions=with_captions)


def _result(run: RunFolder, step: int, figures: dict[str, float]) -> dict[str, Any]:
    return {
        "run": str(run.path),
        "model": str(run.model),
        "state": "finished",
        "step": step,
        "figures": figures,
    }


def split(batch: Batch, num_parts: int) -> list[Batch]:
    """The batch as `num_parts` equal parts, in order."""
    size = len(batch.keys) // num_parts
    return [
        replace(
            batch,
            images=batch.images[i : i + size],
            captions=batch.captions[i : i + size],
            keys=batch.keys[i : i + size],
            epoch=batch.epoch[i : i + size],
            position=batch.position[i : i + size],
            labels=None if batch.labels is None else batch.labels[i : i + size],
            metadata=None if batch.metadata is None else batch.metadata[i : i + size],
        )
        for i in range(0, len(batch.keys), size)
    ]
