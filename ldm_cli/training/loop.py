"""The one loop of all trainers. It knows steps, optimizers, averages and checkpoints; a `Task` knows the rest."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm_cli.errors import CheckpointError, DivergedError, Preempted
from ldm_cli.reporting import Reporter
from ldm_cli.training.checkpoint import (
    checkpoint_name,
    checkpoints,
    commit_folder,
    latest_checkpoint,
    problem_with,
    prune,
)
from ldm_cli.training.config import TrainConfig
from ldm_cli.training.ema import ExponentialMovingAverage
from ldm_cli.training.interruption import StopRequest
from ldm_cli.training.optim import GuardedOptimizers, learning_rate
from ldm_cli.training.run_folder import RunFolder

BatchT = TypeVar("BatchT")
BatchT_contra = TypeVar("BatchT_contra", contravariant=True)
Losses = Iterator[tuple[Tensor, dict[str, Tensor]]]
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Task(Protocol[BatchT_contra]):
    """What a trainer trains.

    Attributes:
        modules: name → module that is trained, averaged and exported.
        auxiliary: name → module that is trained only (a discriminator).
    """

    modules: Mapping[str, nn.Module]
    auxiliary: Mapping[str, nn.Module]

    def losses(self, batch: BatchT_contra, num_parts: int, step: int) -> Losses:
        """Yield scalars whose gradients add up to the gradient of the batch's loss, each with figures to log.

        The caller runs `backward()` on each before asking for the next, so that only one part's activations are
        alive at a time. The first element of each pair also adds up to the loss that is logged unless a figure
        named `loss` takes its place.
        """

    def validate(self) -> dict[str, float]:
        """Figures of the modules' present weights on held-out data, a pure function of the weights."""

    def picture(self, folder: Path) -> None:
        """Draw samples of the modules' present weights into `folder`."""

    def export(self, folder: Path) -> None:
        """Write the modules' present weights to `folder` in their standard layout."""

    def restore(self, folder: Path) -> None:
        """Inverse of `export`: read the modules' weights back, bit for bit."""

    def finalize(self) -> dict[str, float]:
        """Last changes to the finished modules (measured latent statistics); returns figures to log."""


def in_parts(
    loss: Callable[[BatchT], tuple[Tensor, dict[str, Tensor]]], parts: list[BatchT]
) -> Losses:
    """`Task.losses` of a loss that is a mean over independent samples: the mean over equal parts."""
    for part in parts:
        value, figures = loss(part)
        yield value / len(parts), {name: figure.detach() / len(parts) for name, figure in figures.items()}


class _Meter:
    """Sums of figures since the last logged line, on the device; saved in checkpoints, so that resuming keeps them."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, figures: Mapping[str, Tensor]) -> None:
        for name, value in figures.items():
            value = value.detach().to(torch.float64)
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.count += 1

    def means(self) -> dict[str, float]:
        result = {name: value.item() / self.count for name, value in self.sums.items()}
        self.sums, self.count = {}, 0
        return result


class Trainer:
    """The state of one run (weights, moments, averages, step) and what may be done with it: step, save, restore."""

    def __init__(
        self, task: Task[Any], config: TrainConfig, run: RunFolder, device: torch.device, data_state: Mapping[str, Any]
    ) -> None:
        self.task, self.config, self.run, self.device = task, config, run, device
        self.data_state = dict(data_state)
        trained = {**task.modules, **task.auxiliary}
        for module in trained.values():
            module.to(device)
            if config.channels_last:
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizers = GuardedOptimizers(trained, config, device)
        self.ema = (
            ExponentialMovingAverage(task.modules, config.ema_decay, config.ema_warmup)
            if config.ema_decay is not None
            else None
        )
        self.meter = _Meter()
        self.step = 0

    def advance(self, batch: Any) -> None:
        """One optimizer step on the global batch."""
        step, config = self.step + 1, self.config
        dtype = _AUTOCAST.get(config.precision)
        total: dict[str, Tensor] = {}
        loss_sum = torch.zeros((), device=self.device)
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            losses = self.task.losses(batch, config.gradient_accumulation, step)
            while True:
                try:
                    loss, figures = next(losses)
                except StopIteration:
                    break
                with torch.autocast(self.device.type, enabled=False):
                    (loss.float() * self.optimizers.loss_scale).backward()  # type: ignore[no-untyped-call]
                loss_sum = loss_sum + loss.detach().float()
                for name, value in figures.items():
                    total[name] = total[name] + value if name in total else value
        norms, kept = self.optimizers.step(learning_rate(config, step), loss_sum)
        if self.ema is not None:
            self.ema.update(step, kept)
        main = next(iter(self.task.modules))
        grad_norms = {("grad_norm" if name == main else f"grad_norm/{name}"): n for name, n in norms.items()}
        self.meter.add({"loss": loss_sum, **total, **grad_norms, "skipped": 1.0 - kept})
        self.step = step

    def check_finite(self) -> None:
        """Stop when too many steps in a row were skipped.

        Raises:
            DivergedError: more than `max_nonfinite` steps.
        """
        bad = int(self.optimizers.nonfinite_run.item())
        if bad > self.config.max_nonfinite:
            raise DivergedError(
                f"step {self.step} of '{self.run.path}'",
                f"loss or gradient was not finite in {bad} steps in a row",
                "lower train.lr, raise train.warmup_steps or use train.precision=bf16; the last checkpoint is sound",
            )

    def save(self) -> None:
        """Commit a checkpoint of this step and delete the oldest."""
        target = self.run.checkpoints / checkpoint_name(self.step)
        if target.exists():
            return
        commit_folder(target, self._write)
        prune(self.run.checkpoints, self.config.keep_checkpoints)

    def _write(self, folder: Path) -> None:
        self.task.export(folder / "model")
        if self.ema is not None:
            with self.ema.averaged():
                self.task.export(folder / "ema")
        tensors = {f"optimizer.{name}": value for name, value in self.optimizers.state().items()}
        tensors |= {f"meter.{name}": value for name, value in self.meter.sums.items()}
        for name, module in self.task.auxiliary.items():
            tensors |= {f"auxiliary.{name}.{key}": value for key, value in module.state_dict().items()}
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "training.safetensors")
        state = {
            "step": self.step,
            "meter_count": self.meter.count,
            "data": self.data_state,
            "num_threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        (folder / "state.json").write_text(json.dumps(state, indent=1) + "\n")

    def restore(self, folder: Path) -> None:
        """Continue from a verified checkpoint.

        Raises:
            CheckpointError: the checkpoint is of another kind or shape.
        """
        try:
            self.task.restore(folder / "model")
            if self.ema is not None:
                with self.ema.averaged():
                    self.task.restore(folder / "ema")
            tensors = load_file(folder / "training.safetensors")
            self.optimizers.load_state(_below("optimizer.", tensors))
            for name, module in self.task.auxiliary.items():
                module.load_state_dict(_below(f"auxiliary.{name}.", tensors))
            state = json.loads((folder / "state.json").read_text())
        except (KeyError, RuntimeError, ValueError, OSError) as error:
            raise CheckpointError(
                f"cannot continue from '{folder}'", str(error).splitlines()[0], "start again with --resume never"
            ) from error
        self.meter.sums = {name: value.to(self.device) for name, value in _below("meter.", tensors).items()}
        self.meter.count = state["meter_count"]
        self.step = state["step"]
        for what, now in (("num_threads", torch.get_num_threads()), ("torch", torch.__version__)):
            if state[what] != now:
                self.run.warn(f"{what} was {state[what]} and is now {now}: results may differ in the last bits")


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def train(
    task: Task[BatchT],
    batches: Callable[[int, int], Iterator[BatchT]],
    config: TrainConfig,
    run: RunFolder,
    reporter: Reporter,
    *,
    device: torch.device,
    resume: str = "auto",
    max_seconds: float | None = None,
    title: str = "training",
    data_state: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train to `config.steps`, or continue a run that was interrupted, and write the finished model folder.

    Args:
        batches: (first step, end step) → one batch per step; steps count from 0.
        run: the locked run folder, claimed already.
        resume: `auto` continues from the latest checkpoint that verifies, `never` starts at step 0, anything else
            is the path of a checkpoint.

    Returns:
        The final figures.

    Raises:
        Preempted: a signal or the time limit; the checkpoint is saved.
        DivergedError: too many non-finite steps in a row.
    """
    trainer = Trainer(task, config, run, device, data_state or {})
    _resume(trainer, resume)
    run.rewind_metrics(trainer.step)
    run.status("running", step=trainer.step, steps=config.steps)
    figures: dict[str, float] = {}
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest(max_seconds))
        progress = stack.enter_context(reporter.progress(title, config.steps, trainer.step))
        stream = stack.enter_context(closing(batches(trainer.step, config.steps)))  # type: ignore[type-var]
        clock, since = time.perf_counter(), trainer.step
        while trainer.step < config.steps:
            if stop.reason is not None:
                _preempt(trainer, stop.reason)
            _set_training(task, True)
            trainer.advance(next(stream))
            step = trainer.step
            last = step == config.steps
            if device.type == "cpu" or step % config.log_every == 0 or last:
                trainer.check_finite()
            if step % config.log_every == 0 or last:
                figures = trainer.meter.means()
                seconds = time.perf_counter() - clock
                rate = (step - since) * config.batch_size / seconds
                figures |= {"lr": learning_rate(config, step), "images_per_second": rate}
            validated = _due(step, config.validate_every, last)
            if validated:
                figures |= _validate(trainer)
            if step % config.log_every == 0 or last or validated:
                run.append_metrics({"step": step, **{k: _rounded(v) for k, v in figures.items()}})
                progress.update(step, {k: figures[k] for k in ("loss", "images_per_second") if k in figures})
            if _due(step, config.sample_every, last):
                _picture(trainer)
            if step % config.save_every == 0 or last:
                trainer.check_finite()
                trainer.save()
                run.status("running", step=step, steps=config.steps)
            if step % config.log_every == 0 or last or validated:
                clock, since = time.perf_counter(), step
    figures |= _finish(trainer)
    return figures


def _resume(trainer: Trainer, resume: str) -> None:
    folder = trainer.run.checkpoints
    prune(folder, 10**9)
    if resume == "never":
        if checkpoints(folder):
            raise CheckpointError(
                f"'{folder}' holds checkpoints",
                "--resume never would mix two runs",
                f"delete '{trainer.run.path}' or choose another --out",
            )
        return
    if resume == "auto":
        source = latest_checkpoint(folder, trainer.run.warn)
    else:
        source = Path(resume)
        if (problem := problem_with(source)) is not None:
            raise CheckpointError(f"cannot continue from '{source}'", problem, "give another checkpoint")
    if source is not None:
        trainer.restore(source)
        if trainer.step:
            trainer.run.log(f"continuing from step {trainer.step} of {trainer.config.steps}")


def _preempt(trainer: Trainer, reason: str) -> None:
    trainer.save()
    trainer.run.status("preempted", step=trainer.step, steps=trainer.config.steps, reason=reason)
    raise Preempted(
        f"stopped at step {trainer.step} of {trainer.config.steps}",
        reason,
        "checkpoint saved: run the same command again to go on",
    )


def _due(step: int, every: int, last: bool) -> bool:
    return last or (every > 0 and step % every == 0)


def _validate(trainer: Trainer) -> dict[str, float]:
    """Held-out figures of the raw weights and, with the suffix `_ema`, of their average."""
    _set_training(trainer.task, False)
    with torch.no_grad():
        figures = trainer.task.validate()
        if trainer.ema is not None:
            with trainer.ema.averaged():
                figures |= {f"{name}_ema": value for name, value in trainer.task.validate().items()}
    return figures


def _picture(trainer: Trainer) -> None:
    _set_training(trainer.task, False)
    target = trainer.run.samples / checkpoint_name(trainer.step)
    if not target.exists():
        trainer.run.samples.mkdir(exist_ok=True)
        with torch.no_grad(), ExitStack() as stack:
            if trainer.ema is not None:
                stack.enter_context(trainer.ema.averaged())
            commit_folder(target, trainer.task.picture)


def _finish(trainer: Trainer) -> dict[str, float]:
    """Write `model/` from the averaged weights, if there are any, and mark the run finished."""
    _set_training(trainer.task, False)
    with torch.no_grad(), ExitStack() as stack:
        if trainer.ema is not None:
            stack.enter_context(trainer.ema.averaged())
        figures = trainer.task.finalize()
        commit_folder(trainer.run.model, trainer.task.export, replace=True)
    trainer.run.status("finished", step=trainer.step, steps=trainer.config.steps, figures=figures)
    return figures


def _set_training(task: Task[Any], mode: bool) -> None:
    for module in (*task.modules.values(), *task.auxiliary.values()):
        module.train(mode)


def _rounded(value: float | int) -> float | int:
    return value if isinstance(value, int) else float(f"{value:.8g}")
