"""Checkpoints of a trainer: what is in them, how much room they take, and how a trainer continues from one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm_cli.errors import CheckpointError, DivergedError, InputNotFoundError, LdmError, first_line
from ldm_cli.formats.json_file import read_json, write_json
from ldm_cli.formats.model_folder import check_tensors
from ldm_cli.formats.weight_files import named, read_tensors, write_tensors
from ldm_cli.formats.weight_values import expect_finite
from ldm_cli.storage import expect_room, storage_errors
from ldm_cli.training.checkpoint import checkpoint_name, checkpoints, commit_folder, prune, temporary_folder
from ldm_cli.training.host_copy import host_copy, mark
from ldm_cli.training.ranks import Ranks
from ldm_cli.training.task import Task, WeightsByModule
from ldm_cli.training.trainer import Trainer

_TENSORS, _STATE, _PARTS = "training.safetensors", "state.json", "parts"
_HEADER_BYTES = 2**20
"""More than the headers of the files and the small files take."""


class _Snapshot(NamedTuple):
    """A checkpoint's content in the host's memory, contiguous; the run goes on while it is written.

    Attributes:
        weights, averages: module → its state dict; empty on all ranks but the first, and where there are no averages.
        tensors: the other tensors of which rank 0 has all; empty on the other ranks.
        parts: the other tensors of which each rank holds a part, as DTensors.
        facts: content of state.json.
        num_metrics_bytes: size of metrics.jsonl at this step.
    """

    weights: WeightsByModule
    averages: WeightsByModule
    tensors: dict[str, Tensor]
    parts: dict[str, Tensor]
    facts: dict[str, Any]
    num_metrics_bytes: int


def save(trainer: Trainer) -> None:
    """Begin to write a checkpoint of this step, over a damaged one if there is any; all ranks call.

    Waits for the save before this one and for a copy of the state; `trainer.saves` commits the checkpoint, deletes the
    oldest and updates status.json in the background.

    Raises:
        DivergedError: the weights are not finite.
        OutputError, StorageError: the save before this one failed, or there is no room; older checkpoints are as they
            were.
    """
    if trainer.step == trainer.saved_step:
        return
    trainer.saves.wait()
    _expect_finite_weights(trainer)
    run, num_bytes = trainer.run, num_checkpoint_bytes(trainer)
    target = run.checkpoints / checkpoint_name(trainer.step)
    if trainer.ranks.is_first:
        expect_room(run.checkpoints, num_bytes, "a checkpoint")
    if trainer.weights.is_sharded:
        target = Path(trainer.ranks.from_first(str(target)))
    snapshot, arrived = _snapshot(trainer), _arrival(trainer.device)

    def write() -> None:
        arrived()
        if not trainer.ranks.is_first:
            with storage_errors(target, num_bytes):
                _write_parts(temporary_folder(target), snapshot, trainer.ranks)
            return
        fill = lambda folder: _write(trainer, snapshot, folder)  # noqa: E731
        commit_folder(target, fill, replace=True, linked=run.frozen, num_bytes=num_bytes)
        prune(run.checkpoints, trainer.config.keep_checkpoints)
        run.status("running", step=snapshot.facts["step"], steps=trainer.config.steps)

    if trainer.ranks.is_first or snapshot.parts:
        trainer.saves.start(write)
    trainer.saved_step = trainer.step


def _snapshot(trainer: Trainer) -> _Snapshot:
    """Copies of all that a checkpoint holds; all ranks call."""
    is_first = trainer.ranks.is_first
    weights = trainer.on_first_rank(partial(_weights, trainer.task))
    averages: WeightsByModule | None = None
    if trainer.ema is not None and trainer.weights.is_sharded:
        averages = trainer.on_first_rank(partial(_weights, trainer.task), averaged=True)
    elif trainer.ema is not None and is_first:
        averages = _weights(trainer.task, trainer.ema.by_parameter())
    state, parts = _state(trainer), {}
    if trainer.weights.is_sharded:
        from ldm_cli.training.sharded_files import host_part, is_part  # takes seconds to import

        parts = {name: host_part(value) for name, value in state.items() if is_part(value)}
    tensors = {name: host_copy(value) for name, value in state.items() if name not in parts} if is_first else {}
    facts = {"step": trainer.step, "num_threads": torch.get_num_threads(), "torch": torch.__version__}
    return _Snapshot(weights or {}, averages or {}, tensors, parts, facts, trainer.run.metrics.num_bytes())


def _weights(task: Task[Any], averages: Mapping[Tensor, Tensor] = MappingProxyType({})) -> WeightsByModule:
    """Copies of the weights that the modules hold, with the averages of those that have one."""
    return {
        name: {key: host_copy(averages.get(held, held)) for key, held in module.state_dict(keep_vars=True).items()}
        for name, module in task.modules.items()
    }


def export_current(trainer: Trainer, folder: Path) -> None:
    """Write the weights that the modules hold in their standard layout."""
    weights, arrived = _weights(trainer.task), _arrival(trainer.device)
    arrived()
    trainer.task.export(folder, weights)


def _arrival(device: torch.device) -> Callable[[], None]:
    """A function that waits until the copies begun so far are in the host's memory."""
    event = mark(device)
    if event is None:
        return lambda: None

    def wait() -> None:
        torch.cuda.set_device(device)  # a new thread would take the first one
        event.synchronize()

    return wait


def _expect_finite_weights(trainer: Trainer) -> None:
    """Make sure that weights and averages can be loaded again: an update may overflow though its gradient is finite;
    all ranks call.

    Raises:
        DivergedError: some are not finite.
    """
    held = [p.detach() for module in trainer.weights.parameters.values() for p in module.values()]
    held += trainer.ema.average if trainer.ema is not None else []
    sound = torch.stack([value.isfinite().all() for value in held]).all()
    if trainer.ranks.largest(int(not sound)):
        raise DivergedError(
            f"step {trainer.step} of '{trainer.run.path}'",
            "some weights are no longer finite",
            "lower train.lr; no checkpoint was written, the one before is sound",
        )


def expect_finite_result(trainer: Trainer, figures: Mapping[str, float | None]) -> None:
    """Make sure that a run ends in a model and not in numbers that are none.

    Raises:
        DivergedError: weights or figures are not finite, or the last steps were skipped.
    """
    what, remedy = f"the result of '{trainer.run.path}'", "lower train.lr; the last checkpoint is the last sound state"
    for name, module in trainer.task.modules.items():
        bad = [f"{name}.{key}" for key, value in module.state_dict().items() if not bool(value.isfinite().all())]
        if bad:
            raise DivergedError(what, f"weights that are not finite: {named(bad)}", remedy)
    lost = [name for name, value in figures.items() if value is None or not math.isfinite(value)]
    if lost:
        raise DivergedError(what, f"{named(lost)} not finite, {trainer.first_nonfinite()}", remedy)
    if trainer.num_skipped_in_row and trainer.config.precision != "fp16":
        cause = f"loss or gradient was not finite in the last {trainer.num_skipped_in_row} steps"
        raise DivergedError(what, f"{cause}, {trainer.first_nonfinite()}", remedy)


def num_checkpoint_bytes(trainer: Trainer) -> int:
    """Size of the next checkpoint without the files it links to: weights, two moments each, averages, and headers."""
    num_averages = 1 if trainer.ema is not None else 0
    num_bytes = _HEADER_BYTES
    for name, module in trainer.modules.items():
        parameters = dict(module.named_parameters())
        frozen = {name for name, parameter in parameters.items() if not parameter.requires_grad}
        written = sum(value.nbytes for key, value in module.state_dict().items() if key not in frozen)
        written *= trainer.task.num_files if name in trainer.task.modules else 1
        num_bytes += written * (1 + (num_averages if name in trainer.task.modules else 0))
        num_bytes += sum(8 * p.numel() for p in parameters.values() if p.requires_grad)
    return num_bytes


def check_room(trainer: Trainer) -> None:
    """Make sure that the disk has room for the checkpoints that will be kept, and for one that is being written.

    Raises:
        StorageError: it has less.
    """
    folder, config = trainer.run.checkpoints, trainer.config
    num_saved, steps_left = len(checkpoints(folder)), config.steps - trainer.step
    num_most = min(num_saved + -(-steps_left // config.save_every), config.keep_checkpoints + 1)
    if (count := num_most - num_saved) > 0:
        what = f"{count} checkpoint{'s' if count > 1 else ''}"
        expect_room(folder, count * num_checkpoint_bytes(trainer), what)


def _write(trainer: Trainer, snapshot: _Snapshot, folder: Path) -> None:
    """Rank 0 writes full tensors; all ranks together write those of which each holds a part."""
    for name, weights in (("model", snapshot.weights), ("ema", snapshot.averages)):
        if weights:
            trainer.task.export(folder / name, weights)
    if snapshot.parts:
        _write_parts(folder, snapshot, trainer.ranks)
    write_tensors(folder / _TENSORS, snapshot.tensors)
    write_json(folder / _STATE, snapshot.facts)
    trainer.run.copy_records(folder, snapshot.num_metrics_bytes)


def _write_parts(folder: Path, snapshot: _Snapshot, ranks: Ranks) -> None:
    from ldm_cli.training.sharded_files import write_parts  # takes seconds to import

    write_parts(folder / _PARTS, snapshot.parts, ranks)


def _state(trainer: Trainer) -> dict[str, Tensor]:
    """The tensors of a checkpoint beside its model folders."""
    tensors = {f"optimizer.{name}": value for name, value in trainer.optimizers.state().items()}
    tensors |= {f"meter.sum.{name}": value for name, value in trainer.means.sums.items()}
    tensors |= {f"meter.count.{name}": value for name, value in trainer.means.counts.items()}
    for name, module in trainer.task.auxiliary.items():
        tensors |= {f"auxiliary.{name}.{key}": value for key, value in module.state_dict().items()}
    return tensors


def restore(trainer: Trainer, folder: Path) -> None:
    """Continue from a verified checkpoint.

    Raises:
        CheckpointError: the checkpoint is of another kind or shape.
    """
    try:
        with trainer.weights.loading():
            trainer.task.restore(folder / "model")
        if trainer.ema is not None:
            with trainer.ema.averaged(), trainer.weights.loading():
                trainer.task.restore(folder / "ema")
        tensors, state = _read(trainer, folder), read_json(folder / _STATE)
        trainer.optimizers.load_state(_below("optimizer.", tensors))
        for name, module in trainer.task.auxiliary.items():
            found = _below(f"auxiliary.{name}.", tensors)
            check_tensors(module.state_dict(), found, folder / _TENSORS)
            expect_finite(found, folder / _TENSORS)
            module.load_state_dict(found)
        step, threads, version = int(state["step"]), state["num_threads"], state["torch"]
    except (InputNotFoundError, CheckpointError, KeyError, RuntimeError, ValueError, TypeError) as error:
        cause = f"{error.what}: {error.cause}" if isinstance(error, LdmError) else first_line(error)
        remedy = "it belongs to another model or recipe: choose another --out or --resume"
        raise CheckpointError(f"cannot continue from '{folder}'", cause, remedy) from error
    for kind, values in (("sum", trainer.means.sums), ("count", trainer.means.counts)):
        values |= {n: v.to(trainer.device) for n, v in _below(f"meter.{kind}.", tensors).items()}
    trainer.step = step
    for what, then, now in (
        ("the number of threads", threads, torch.get_num_threads()),
        ("the version of torch", version, torch.__version__),
    ):
        if then != now:
            trainer.run.warn(f"{what} was {then} and is now {now}: results may differ in the last bits")


def _read(trainer: Trainer, folder: Path) -> dict[str, Tensor]:
    """Inverse of `_state`; moments of which this rank holds a part are DTensors."""
    tensors = read_tensors(folder / _TENSORS)
    if (folder / _PARTS).is_dir():
        from ldm_cli.training.sharded_files import read_parts  # takes seconds to import

        moments = trainer.optimizers.empty_moments(_below("optimizer.", tensors))
        parts = {f"optimizer.{n}": value for n, value in moments.items() if f"optimizer.{n}" not in tensors}
        read_parts(folder / _PARTS, parts, trainer.ranks)
        tensors |= parts
    return tensors


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
