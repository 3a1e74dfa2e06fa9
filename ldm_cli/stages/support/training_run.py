"""The part that all training commands share: open the data, own the run folder, pass a task to the loop."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ldm_cli import __version__
from ldm_cli.data.bad_samples import BadSampleLog
from ldm_cli.data.batch import Batch
from ldm_cli.data.config import DataConfig
from ldm_cli.data.latent_cache import LatentCache
from ldm_cli.data.loader import Loader, sequential_batches
from ldm_cli.data.open_shards import in_both, open_shards
from ldm_cli.data.order import ORDER
from ldm_cli.data.shards import ShardSet
from ldm_cli.data.streaming import Stream, open_stream
from ldm_cli.data.to_device import sent_to_device
from ldm_cli.errors import RecipeError
from ldm_cli.formats.model_source import weights_sha256
from ldm_cli.recipe.train_recipe import TrainRecipe
from ldm_cli.reporting import Reporter
from ldm_cli.stages.support.data_trace import traced
from ldm_cli.stages.support.model_sizes import Parameters, expect_memory
from ldm_cli.stages.support.options import RunOptions, resolve_device
from ldm_cli.training.distributed import joined, local_rank
from ldm_cli.training.interruption import StopRequest
from ldm_cli.training.loop import train
from ldm_cli.training.ranks import Ranks
from ldm_cli.training.run_folder import RunFolder
from ldm_cli.training.run_identity import EVERY_BYTE, flatten
from ldm_cli.training.task import Task
from ldm_cli.training.tracking import expect_trackers


@dataclass(frozen=True)
class Workbench:
    """The surroundings of a task: run folder, data, device."""

    run: RunFolder
    shards: ShardSet | Stream
    held_out: tuple[Batch, ...]
    """The first `train.validation_samples` samples of `data.val_shards`, in order; empty without them."""
    device: torch.device
    reporter: Reporter
    cache: LatentCache | None = None
    """Encodings of the training data, which the batches then hold instead of images."""
    ranks: Ranks = field(default_factory=Ranks)
    """The processes that train together."""
    sharing: Ranks = field(default_factory=Ranks)
    """The processes that share validation and sample pictures: those that hold full weights."""


def run_training(
    recipe: TrainRecipe,
    options: RunOptions,
    reporter: Reporter,
    build: Callable[[Workbench], Task[Batch]],
    parameters: Parameters,
    *,
    uses: Mapping[str, str] | None = None,
    facts: Mapping[str, str] | None = None,
    open_cache: Callable[[ShardSet], LatentCache] | None = None,
    with_captions: bool = True,
) -> dict[str, Any]:
    """Train the run that `recipe` describes, or continue it, or report that it is finished.

    Args:
        build: makes the task; torch's generator is seeded for the initial weights, and restored.
        parameters: how many there are.
        uses: recipe field → folder of a model that the task uses or, `start_from`, begins at; its weights belong to the
            run's identity. A run that begins at trained weights is validated before its first step.
        facts: other values that belong to the run's identity, by name.
        open_cache: opens the encodings of the training data, in a run that is not finished.
        with_captions: False reads images alone, so that shards without captions serve.

    Returns:
        `run`, `model`, `state`, `step` and the final figures.
    """
    device = resolve_device(options.device, local_rank())
    with StopRequest(options.max_time) as stop, joined(device, recipe.train.rank_timeout) as ranks:
        recipe.train.parts_per_rank(ranks.world_size)
        expect_memory(recipe, parameters, device, ranks.world_size, reads_images=open_cache is None)
        if recipe.train.deterministic == "elastic":
            _compute_alike(device)
        run = RunFolder(options.out or Path("runs") / recipe.name, reporter)
        # The time limit does not interrupt indexing: the index is kept, but no run folder could note the interruption.
        with _nothing_to_save(stop, ranks, with_limit=False), ranks.first_then_others():
            hashed = EVERY_BYTE in run.recorded().get("fingerprints", {})
            shards = open_data(recipe.data, reporter, hashed)
        resolved = recipe.to_mapping()
        fingerprints = _of_data(shards) | {"device": device.type} | dict(facts or {})
        fingerprints |= {name: weights_sha256(Path(folder)) for name, folder in (uses or {}).items()}
        ranks.expect_equal(_facts(resolved, fingerprints))
        status = json.loads(ranks.from_first(json.dumps(run.finished() if ranks.is_first else None)))
        if status is not None and status["steps"] == recipe.train.steps and options.resume != "never":
            run.changes(resolved, fingerprints)
            reporter.info(f"'{run.path}' is finished already: step {status['step']}")
            return _result(run, status["step"], status["figures"])
        expect_trackers(recipe.train.track)
        if ranks.is_first:
            _say_what_is_slow(recipe, device, reporter)
        cache = _cache_of(shards, open_cache) if open_cache else None
        with run if ranks.is_first else nullcontext():
            if ranks.is_first and options.resume == "never":
                run.expect_unused()
            if ranks.is_first:
                run.claim(resolved, options.recipe_text, fingerprints, device)
            ranks.wait()
            bench = Workbench(run, shards, (), device, reporter, cache, ranks)
            figures = _train(recipe, options, bench, build, stop, with_captions, "start_from" in (uses or {}))
    return _result(run, recipe.train.steps, figures)


def _cache_of(shards: ShardSet | Stream, open_cache: Callable[[ShardSet], LatentCache]) -> LatentCache:
    if isinstance(shards, Stream):
        raise RecipeError("a cache cannot be used with data.stream", "its samples are numbered", "remove one")
    return open_cache(shards)


def _train(
    recipe: TrainRecipe,
    options: RunOptions,
    bench: Workbench,
    build: Callable[[Workbench], Task[Batch]],
    stop: StopRequest,
    with_captions: bool,
    validates_start: bool,
) -> dict[str, Any]:
    ranks = bench.ranks
    with _nothing_to_save(stop, ranks), ranks.first_then_others(), torch.random.fork_rng(devices=[]):
        sharing = ranks if recipe.train.strategy == "replicated" else Ranks()
        if sharing.world_size > 1 or ranks.is_first:
            held_out = tuple(_held_out(recipe, ranks.world_size, bench, with_captions))
            bench = replace(bench, held_out=held_out, sharing=sharing)
        torch.manual_seed(recipe.seed)
        task = build(bench)
    loader = Loader(
        bench.shards,
        recipe.data,
        seed=recipe.seed,
        batch_size=recipe.train.batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        with_captions=with_captions,
        report_bad=BadSampleLog(bench.run.path / "bad_samples.jsonl"),
        cache=bench.cache,
    )

    def batches(start: int, end: int) -> Iterator[Batch]:
        return sent_to_device(loader.batches(start, end), bench.device, task.prepare, loader.interrupt)

    return train(
        task,
        batches if options.data_trace is None else traced(batches, options.data_trace, ranks),
        recipe.train,
        bench.run,
        bench.reporter,
        device=bench.device,
        stop=stop,
        ranks=ranks,
        validates_start=validates_start,
        start=None if options.resume in ("auto", "never") else Path(options.resume),
        title=recipe.name,
    )


def _compute_alike(device: torch.device) -> None:
    """Let the sums of this process depend on nothing but their terms, as far as torch can."""
    if device.type == "cpu":
        torch.set_num_threads(1)  # sums depend on the number of threads, and ranks share the cores
    else:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it
        torch.use_deterministic_algorithms(True, warn_only=True)


def _say_what_is_slow(recipe: TrainRecipe, device: torch.device, reporter: Reporter) -> None:
    if device.type == "cpu" and recipe.train.precision != "fp32":
        reporter.warn(f"{recipe.train.precision} is slower than fp32 on most CPUs: see train.precision=fp32")


def open_data(config: DataConfig, reporter: Reporter, hashed: bool = False) -> ShardSet | Stream:
    """The training shards of a recipe; arguments and errors as of `open_shards` and `open_stream`."""
    return open_stream(config, reporter) if config.stream else open_shards(config.shards, config, reporter, hashed)


def _of_data(shards: ShardSet | Stream) -> dict[str, str]:
    """The fingerprints of the training data by name."""
    return {"data": shards.fingerprint, "order": ORDER} | ({} if shards.sha256 is None else {EVERY_BYTE: shards.sha256})


def _nothing_to_save(stop: StopRequest, ranks: Ranks, *, with_limit: bool = True) -> AbstractContextManager[None]:
    """Answer signals at once during preparations; several ranks stop together, before their first step."""
    return stop.answered_at_once(with_limit=with_limit) if ranks.world_size == 1 else nullcontext()


def _facts(resolved: Mapping[str, Any], fingerprints: Mapping[str, str]) -> dict[str, str]:
    """The values that all ranks must share."""
    facts = {f"recipe: {name}": repr(value) for name, value in flatten(resolved).items()}
    facts |= {f"fingerprint of {name}": value for name, value in fingerprints.items()}
    return facts | {"version of ldm": __version__, "version of torch": torch.__version__}


def _held_out(recipe: TrainRecipe, world_size: int, bench: Workbench, with_captions: bool) -> Iterator[Batch]:
    if recipe.data.val_shards is None:
        return
    shards = open_shards(recipe.data.val_shards, recipe.data, bench.reporter)
    if isinstance(bench.shards, ShardSet) and (remark := in_both(bench.shards, shards)):
        bench.reporter.warn(remark)
    size, limit = recipe.train.part_size(world_size), recipe.train.validation_samples
    yield from sequential_batches(shards, recipe.data, size, limit=limit, with_captions=with_captions)


def _result(run: RunFolder, step: int, figures: dict[str, float]) -> dict[str, Any]:
    return {"run": str(run.path), "model": str(run.model), "state": "finished", "step": step, "figures": figures}
