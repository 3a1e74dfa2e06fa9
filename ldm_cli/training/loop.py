"""The one loop of all trainers. It knows when to step, log, validate and save; a `Task` knows the rest."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ldm_cli.errors import Preempted
from ldm_cli.reporting import Progress, Reporter
from ldm_cli.training.checkpoint import checkpoint_name, commit_folder
from ldm_cli.training.config import TrainConfig
from ldm_cli.training.interruption import MORE_TIME, TIME_LIMIT, StopRequest, stop_reason
from ldm_cli.training.optim import learning_rate
from ldm_cli.training.ranks import Ranks
from ldm_cli.training.resuming import resume
from ldm_cli.training.run_folder import RunFolder
from ldm_cli.training.saving import check_room, expect_finite_result, export_current, save
from ldm_cli.training.task import BatchT, Task
from ldm_cli.training.tracking import Trackers
from ldm_cli.training.trainer import Trainer


class _Throughput:
    """Images per second of training alone."""

    def __init__(self) -> None:
        self.num_images, self.started = 0, time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time within does not count."""
        before = time.perf_counter()
        yield
        self.started += time.perf_counter() - before

    def rate(self) -> float:
        """Images per second since the last call."""
        rate = self.num_images / (time.perf_counter() - self.started)
        self.num_images, self.started = 0, time.perf_counter()
        return rate


class _Due(NamedTuple):
    """The work that follows a step."""

    log: bool
    validate: bool
    picture: bool
    save: bool

    @classmethod
    def after(cls, step: int, config: TrainConfig) -> _Due:
        """The work due after `step`; all of it after the last one."""
        periods = (config.log_every, config.validate_every, config.sample_every, config.save_every)
        return cls(*(step == config.steps or (every > 0 and step % every == 0) for every in periods))


class _Line:
    """A line of metrics.jsonl that is being read from the device."""

    def __init__(self, trainer: Trainer, has_figures: bool) -> None:
        self.step, self.figures = trainer.step, dict[str, float]()
        self._read = trainer.begin_reading(has_figures)

    def wait(self) -> None:
        """Wait for the figures; errors as of the function of `Trainer.begin_reading`."""
        self.figures = self._read() | self.figures

    def write(self, trainer: Trainer, progress: Progress) -> None:
        """Log the figures, if there are any."""
        if self.figures and trainer.ranks.is_first:
            _log_figures(trainer, self.step, self.figures)
            shown = ("loss", "images_per_second")
            progress.update(self.step, {name: value for name, value in self.figures.items() if name in shown})


def train(
    task: Task[BatchT],
    batches: Callable[[int, int], Iterator[BatchT]],
    config: TrainConfig,
    run: RunFolder,
    reporter: Reporter,
    *,
    device: torch.device,
    stop: StopRequest,
    ranks: Ranks | None = None,
    start: Path | None = None,
    validates_start: bool = False,
    title: str = "training",
) -> dict[str, Any]:
    """Train to `config.steps`, or continue an interrupted run, and write the finished model folder.

    Args:
        batches: (first step, end step) → one batch per step, of this rank's samples; steps count from 0.
        run: the run folder, locked and claimed already by rank 0, which alone writes to it.
        stop: entered already, so that a signal during the preparations is not lost.
        ranks: the processes that train together; None: this process alone.
        start: checkpoint or run where a run without checkpoints of its own begins; None: at step 0.
        validates_start: whether a run that begins at step 0 validates the weights it begins with.

    Returns:
        The figures of the last step and of the finished model.

    Raises:
        Preempted: a signal or the time limit; the checkpoint is saved.
        DivergedError: too many non-finite steps in a row, or a result that is not finite.
        StorageError: a checkpoint finds no room.
        WorkerError: another rank failed or is gone.
    """
    trainer = Trainer(task, config, run, device, ranks or Ranks())
    _begin(trainer, start, validates_start)
    first_step = trainer.step
    with ExitStack() as stack:
        stack.enter_context(trainer.saves)
        trackers = stack.enter_context(Trackers(config.track if trainer.ranks.is_first else (), run.path, run.warn))
        progress = stack.enter_context(reporter.progress(title, config.steps, trainer.step))
        stream = stack.enter_context(closing(batches(trainer.step, config.steps)))  # type: ignore[type-var]
        throughput, earlier = _Throughput(), list[_Line]()
        while trainer.step < config.steps:
            trainer.saves.check()
            trackers.check()
            if reason := stop_reason(trainer.ranks.largest(stop.code)):
                for line in earlier:
                    line.wait()
                    line.write(trainer, progress)
                _preempt(trainer, reason, trainer.step > first_step)
            trainer.set_training(True)
            run.begin_step(trainer.step + 1)
            trainer.advance(next(stream))
            progress.update(trainer.step)
            throughput.num_images += config.batch_size
            due = _Due.after(trainer.step, config)
            if device.type == "cpu" or any(due):
                earlier = _after_step(trainer, due, earlier, throughput, progress)
    return _finish(trainer)


def _begin(trainer: Trainer, start: Path | None, validates_start: bool) -> None:
    """Bring a trainer to where its run is, and validate at step 0 if asked to."""
    run, is_first = trainer.run, trainer.ranks.is_first
    own = resume(trainer, start)
    trainer.expect_same_weights()
    if is_first:
        run.restore_metrics(own)
        check_room(trainer)
        run.status("running", step=trainer.step, steps=trainer.config.steps)
    if validates_start and trainer.step == 0 and (figures := _validate(trainer)) and is_first:
        _log_figures(trainer, trainer.step, figures)


def _after_step(
    trainer: Trainer, due: _Due, earlier: list[_Line], throughput: _Throughput, progress: Progress
) -> list[_Line]:
    """Read the figures of the steps before, and do what is due.

    Args:
        earlier: lines that are not written yet: at most one.

    Returns:
        The lines that are not written yet. Where a line alone is due, a GPU is not waited for: its figures are read
        when the next one is begun.
    """
    line, config = _Line(trainer, due.log), trainer.config
    waits = trainer.device.type == "cpu" or due.validate or due.picture or due.save
    for awaited in [*earlier, line] if waits else earlier:
        awaited.wait()
    if due.log:
        line.figures |= {"lr": learning_rate(config, trainer.step), "images_per_second": throughput.rate()}
    with throughput.paused():
        for read in earlier:
            read.write(trainer, progress)
        if not waits:
            return [line]
        trainer.run.begin_step(None)
        _follow_up(trainer, due, line, progress)
    return []


def _follow_up(trainer: Trainer, due: _Due, line: _Line, progress: Progress) -> None:
    """Validate, log, generate pictures and save after a step; saving comes last, when all else is done."""
    if due.save:
        trainer.expect_same_weights()
    if due.validate:
        line.figures |= _validate(trainer)
    line.write(trainer, progress)
    if due.picture:
        _picture(trainer)
    if due.save:
        save(trainer)


def _log_figures(trainer: Trainer, step: int, figures: Mapping[str, float]) -> None:
    if bad := [name for name, value in figures.items() if not math.isfinite(value)]:
        trainer.run.warn(f"step {step}: {', '.join(bad)} not finite, written as null")
    trainer.run.metrics.append({"step": step, **{name: _rounded(value) for name, value in figures.items()}})


def _preempt(trainer: Trainer, reason: str, has_stepped: bool) -> None:
    save(trainer)
    trainer.saves.wait()
    trainer.ranks.wait()
    no_progress = reason == TIME_LIMIT and not has_stepped
    remedy = MORE_TIME if no_progress else "checkpoint saved: run the same command again to go on"
    raise Preempted(f"stopped at step {trainer.step} of {trainer.config.steps}", reason, remedy)


def _validate(trainer: Trainer) -> dict[str, float]:
    """Held-out figures of the raw weights and, with the suffix `_ema`, of their average."""
    trainer.set_training(False)
    with torch.no_grad(), trainer.autocast(cached=False):
        figures = trainer.on_first_rank(trainer.task.validate, shared=True) or {}
        if trainer.ema is not None:
            averaged = trainer.on_first_rank(trainer.task.validate, averaged=True, shared=True) or {}
            figures |= {f"{name}_ema": value for name, value in averaged.items()}
    return figures


def _picture(trainer: Trainer) -> None:
    trainer.set_training(False)
    target = trainer.run.samples / checkpoint_name(trainer.step)
    if trainer.ranks.largest(int(trainer.ranks.is_first and target.exists())):
        return

    def generate() -> None:
        if not trainer.ranks.is_first:
            trainer.task.picture(None)
            return
        trainer.run.samples.mkdir(exist_ok=True)
        commit_folder(target, trainer.task.picture)

    with torch.no_grad(), trainer.autocast(cached=False):
        trainer.on_first_rank(generate, averaged=True, shared=True)


def _finish(trainer: Trainer) -> dict[str, float]:
    """Write `model/` from the averaged weights, if there are any, and mark the run finished."""
    trainer.set_training(False)

    def conclude() -> dict[str, float]:
        figures = trainer.run.metrics.last() | trainer.task.finalize()
        expect_finite_result(trainer, figures)
        export = partial(export_current, trainer)
        commit_folder(trainer.run.model, export, replace=True, linked=trainer.run.frozen)
        return figures

    with torch.no_grad():
        figures = trainer.on_first_rank(conclude, averaged=True)
    if figures is None:
        return {}
    trainer.run.status("finished", step=trainer.step, steps=trainer.config.steps, code=0, figures=figures)
    return figures


def _rounded(value: float) -> float | None:
    """Eight digits; null for a value that JSON cannot express."""
    return float(f"{value:.8g}") if math.isfinite(value) else None
