"""The state of one run, and one step of it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ldm_cli.core.compiling import compile_regions, eagerly
from ldm_cli.core.cpu import tune_for_cpu
from ldm_cli.errors import (
    CheckpointError,
    DivergedError,
    InputNotFoundError,
    LdmError,
    StorageError,
    WorkerError,
    first_line,
)
from ldm_cli.formats.json_file import read_json, write_json
from ldm_cli.formats.model_folder import check_tensors
from ldm_cli.formats.weight_files import read_tensors, write_tensors
from ldm_cli.storage import megabytes, storage_errors
from ldm_cli.training.checkpoint import checkpoint_name, checkpoints, commit_folder, prune
from ldm_cli.training.config import TrainConfig
from ldm_cli.training.distributed import Ranks
from ldm_cli.training.ema import ExponentialMovingAverage
from ldm_cli.training.gradient_sum import part_sum
from ldm_cli.training.optim import GuardedOptimizers, learning_rate
from ldm_cli.training.run_folder import RunFolder
from ldm_cli.training.skipped_steps import SkippedSteps
from ldm_cli.training.task import Task, sample_names
from ldm_cli.training.weights import Weights

T = TypeVar("T")

_TENSORS, _STATE, _PARTS = "training.safetensors", "state.json", "parts"
_HEADER_BYTES = 2**20
"""More than the headers of the files and the small files take."""
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class _Meter:
    """Means of figures since the last logged line, on the device; they are saved in checkpoints.

    Each figure is averaged over the steps that had it and were taken: the figures of a skipped step are not
    finite.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}

    def add(self, figures: Mapping[str, Tensor], counts: Tensor) -> None:
        """`counts` is 1.0 if the figures count, else 0.0."""
        for name, value in figures.items():
            value = torch.where(counts > 0, value.detach().double(), 0.0)
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0.0) + counts.double()

    def means(self) -> dict[str, float]:
        """The means; starts anew. Figures without a step that counts are left out."""
        means = {name: (value / self.counts[name]).item() for name, value in self.sums.items()}
        self.sums, self.counts = {}, {}
        return {name: value for name, value in means.items() if not math.isnan(value)}


class Trainer:
    """Weights, moments, averages, buffers and the step of a run: advanced, saved, restored."""

    def __init__(
        self,
        task: Task[Any],
        config: TrainConfig,
        run: RunFolder,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        self.part_sum = part_sum(config, ranks)
        self.task, self.config, self.run, self.device = task, config, run, device
        trained = {**task.modules, **task.auxiliary}
        self.weights = _held(task, config, device, ranks)
        self.optimizers = GuardedOptimizers(self.weights, config, device)
        self.ema = None
        if config.ema_decay is not None:
            averaged = [p for name in task.modules for p in self.weights.parameters[name].values()]
            self.ema = ExponentialMovingAverage(averaged, config.ema_decay, config.ema_warmup)
        self.buffers = [buffer for module in trained.values() for buffer in module.buffers()]
        self.meter = _Meter()
        self.skipped = SkippedSteps()
        self.step = 0
        self.saved_step: int | None = None

    def advance(self, batch: Any) -> None:
        """One optimizer step on this rank's part of the global batch."""
        step, num_parts = self.step + 1, self.part_sum.num_parts
        before = [buffer.clone() for buffer in self.buffers]
        figures = self._sum_over_parts(batch, step, before)
        norms, kept = self.optimizers.step(learning_rate(self.config, step), figures["loss"], num_parts)
        # Batch statistics of a skipped step may not be finite either.
        for buffer, old in zip(self.buffers, before, strict=True):
            buffer.copy_(torch.where(kept > 0, buffer, old))
        if self.ema is not None:
            self.ema.update(step, kept)
        main = next(iter(self.task.modules))
        grad_norms = {("grad_norm" if name == main else f"grad_norm/{name}"): n for name, n in norms.items()}
        self.meter.add({name: value / num_parts for name, value in figures.items()} | grad_norms, kept)
        self.meter.add({"skipped": 1.0 - kept}, torch.ones_like(kept))
        self.skipped.add(step, sample_names(batch), kept)
        self.step = step

    def _sum_over_parts(self, batch: Any, step: int, before: list[Tensor]) -> dict[str, Tensor]:
        """Leave the gradients of all parts and ranks, added up, in the parameters, and the mean of what each part
        makes of the buffers in the buffers.

        Returns:
            The figures, added up over all parts and ranks; `loss` is one of them.
        """
        names: list[str] = []
        taken: list[nn.Parameter] = []
        add = self.part_sum if self.part_sum.is_canonical else self.part_sum.within_rank
        total = add(self._contributions(batch, step, before, names, taken))
        sizes = [parameter.numel() for parameter in taken]
        *gradients, rest = torch.split(total, [*sizes, len(total) - sum(sizes)])
        for parameter, gradient in zip(taken, gradients, strict=True):
            # empty_like keeps the parameter's memory order, on which the fused kernel depends
            parameter.grad = torch.empty_like(parameter).copy_(gradient.view(parameter.shape))
        if not self.part_sum.is_canonical:
            self.weights.sum_gradients(rest)
        values, *changes = torch.split(rest, [len(names), *(buffer.numel() for buffer in before)])
        for buffer, old, change in zip(self.buffers, before, changes, strict=True):
            buffer.copy_(old + (change / self.part_sum.num_parts).view(old.shape))
        return dict(zip(names, values.unbind(), strict=True))

    def _contributions(
        self, batch: Any, step: int, before: list[Tensor], names: list[str], taken: list[nn.Parameter]
    ) -> Iterator[Tensor]:
        """Run part after part, and yield of each one, in a row: the gradients, if their sum is to be canonical (else
        they add up in the parameters), the figures, and what changed in the buffers.

        Args:
            names: is filled with the names of the figures.
            taken: is filled with the parameters whose gradients are in the row.
        """
        dtype = _AUTOCAST.get(self.config.precision)
        losses = self.task.losses(batch, self.part_sum.parts_per_rank, step)
        while True:
            with torch.autocast(
                self.device.type, dtype, enabled=dtype is not None, cache_enabled=not self.weights.is_sharded
            ):
                part = next(losses, None)
            if part is None:
                return
            loss, figures = part
            (loss.float() * self.optimizers.loss_scale).backward()  # type: ignore[no-untyped-call]
            values = {"loss": loss, **figures}
            row = [torch.stack([value.detach().float() for value in values.values()])]
            row += [(buffer - old).float().reshape(-1) for buffer, old in zip(self.buffers, before, strict=True)]
            for buffer, old in zip(self.buffers, before, strict=True):
                buffer.copy_(old)
            names[:] = values
            if self.part_sum.is_canonical:
                taken[:] = [p for module in self.optimizers.parameters.values() for p in module if p.grad is not None]
                row = [*(p.grad.reshape(-1) for p in taken if p.grad is not None), *row]
                for parameter in taken:
                    parameter.grad = None
            yield torch.cat(row)

    def expect_same_weights(self) -> None:
        """Make sure that all ranks hold the same weights, by a sum over each parameter.

        Raises:
            WorkerError: they do not.
        """
        ranks, parameters = self.part_sum.ranks, [p.detach() for p in self.weights.replicas()]
        if ranks.world_size == 1 or not parameters:
            return
        sums = torch.stack([p.double().sum() for p in parameters])
        rows = ranks.gathered(sums[None].cpu())
        # What is not finite on all ranks is the same, though a NaN equals nothing.
        if not torch.allclose(rows, rows[:1].expand_as(rows), rtol=0, atol=0, equal_nan=True):
            raise WorkerError(
                f"the weights of the ranks differ at step {self.step}",
                "their machines do not compute alike",
                "continue from the last checkpoint on machines of one kind",
            )

    def _expect_finite_weights(self) -> None:
        """Make sure that the weights and averages can be loaded again: an update may overflow though its gradient is
        finite; all ranks call.

        Raises:
            DivergedError: some are not finite.
        """
        held = [p.detach() for module in self.weights.parameters.values() for p in module.values()]
        held += self.ema.average if self.ema is not None else []
        sound = torch.stack([value.isfinite().all() for value in held]).all()
        if self.part_sum.ranks.largest(int(not sound)):
            raise DivergedError(
                f"step {self.step} of '{self.run.path}'",
                "some weights are no longer finite",
                "lower train.lr; no checkpoint was written, the one before is sound",
            )

    def check_finite(self) -> None:
        """Tell of skipped steps, and stop when they are too many in a row; all ranks call.

        Raises:
            DivergedError: more than `max_nonfinite` steps.
        """
        self.skipped.tell(self.run, self.part_sum.ranks, is_expected=self.config.precision == "fp16")
        bad = int(self.optimizers.nonfinite_run.item())
        if bad > self.config.max_nonfinite:
            raise DivergedError(
                f"step {self.step} of '{self.run.path}'",
                f"loss or gradient was not finite in {bad} steps in a row",
                "lower train.lr or raise train.warmup_steps; the last checkpoint is sound, log.txt names the samples",
            )

    def present(self, act: Callable[[], T], *, averaged: bool = False) -> T | None:
        """What rank 0 finds with the whole weights, or their averages, in the task's modules, uncompiled; all ranks
        call, and the others find None."""
        ranks = self.part_sum.ranks
        if not (ranks.is_first or self.weights.is_sharded):
            return None
        with ExitStack() as stack:
            if averaged and self.ema is not None:
                stack.enter_context(self.ema.averaged())
            stack.enter_context(self.weights.whole())
            stack.enter_context(eagerly())
            return act() if ranks.is_first else None

    def save(self) -> None:
        """Commit a checkpoint of this step, over a damaged one if there is any, and delete the oldest; all ranks call.

        Raises:
            DivergedError: the weights are not finite.
            OutputError, StorageError: it cannot be written; the older ones are as they were.
        """
        if self.step == self.saved_step:
            return
        self._expect_finite_weights()
        target = self.run.checkpoints / checkpoint_name(self.step)
        if self.part_sum.ranks.is_first:
            num_bytes = self.num_checkpoint_bytes()
            self._expect_room(num_bytes, "a checkpoint")
            self.run.sync_metrics()
            commit_folder(target, self._write, replace=True, linked=self.run.frozen, num_bytes=num_bytes)
            prune(self.run.checkpoints, self.config.keep_checkpoints)
        elif self.weights.is_sharded:
            with storage_errors(target, self.num_checkpoint_bytes()):
                self._write(target)
        self.saved_step = self.step

    def num_checkpoint_bytes(self) -> int:
        """Size of the next checkpoint, but for what it links to: weights, two moments each, averages, and headers."""
        trained = {**self.task.modules, **self.task.auxiliary}
        parameters = [p for module in trained.values() for p in module.parameters() if p.requires_grad]
        exported = [*trained.values(), *(self.task.modules.values() if self.ema is not None else ())]
        weights: int = sum(value.nbytes for module in exported for value in module.state_dict().values())
        return weights + sum(8 * p.numel() for p in parameters) + _HEADER_BYTES

    def check_room(self) -> None:
        """Make sure that the checkpoints to come find room: those that are kept, and one that is being written.

        Raises:
            StorageError: the disk has less room.
        """
        period, left = self.config.save_every, self.config.steps - self.step
        there = len(checkpoints(self.run.checkpoints))
        most = min(there + -(-left // period), self.config.keep_checkpoints + 1)
        if (count := most - there) > 0:
            self._expect_room(count * self.num_checkpoint_bytes(), f"{count} checkpoint{'s' if count > 1 else ''}")

    def _expect_room(self, num_bytes: int, what: str) -> None:
        free = shutil.disk_usage(self.run.path).free
        if free < num_bytes:
            raise StorageError(
                f"no room for {what} in '{self.run.checkpoints}'",
                f"it takes {megabytes(num_bytes)}, and {megabytes(free)} are free",
                "free some space and run the same command again",
            )

    def _write(self, folder: Path) -> None:
        """Rank 0 writes what is whole, all ranks together what they hold in parts; `folder` is rank 0's."""
        is_first = self.part_sum.ranks.is_first
        if self.weights.is_sharded:
            folder = Path(self.part_sum.ranks.from_first(str(folder)))
        self.present(lambda: self.task.export(folder / "model"))
        if self.ema is not None:
            self.present(lambda: self.task.export(folder / "ema"), averaged=True)
        tensors = {f"optimizer.{name}": value for name, value in self.optimizers.state().items()}
        tensors |= {f"meter.sum.{name}": value for name, value in self.meter.sums.items()}
        tensors |= {f"meter.count.{name}": value for name, value in self.meter.counts.items()}
        for name, module in self.task.auxiliary.items():
            tensors |= {f"auxiliary.{name}.{key}": value for key, value in module.state_dict().items()}
        if self.weights.is_sharded:
            from ldm_cli.training.sharded_files import is_part, write_parts  # takes seconds to import

            parts = {name: value for name, value in tensors.items() if is_part(value)}
            tensors = {name: value for name, value in tensors.items() if name not in parts}
            write_parts(folder / _PARTS, parts, self.part_sum.ranks)
        if not is_first:
            return
        write_tensors(folder / _TENSORS, tensors)
        facts = {"step": self.step, "num_threads": torch.get_num_threads(), "torch": torch.__version__}
        write_json(folder / _STATE, facts)

    def restore(self, folder: Path) -> None:
        """Continue from a verified checkpoint.

        Raises:
            CheckpointError: the checkpoint is of another kind or shape.
        """
        try:
            with self.weights.refilled():
                self.task.restore(folder / "model")
            if self.ema is not None:
                with self.ema.averaged(), self.weights.refilled():
                    self.task.restore(folder / "ema")
            tensors, state = read_tensors(folder / _TENSORS), read_json(folder / _STATE)
            if (folder / _PARTS).is_dir():
                from ldm_cli.training.sharded_files import read_parts  # takes seconds to import

                moments = self.optimizers.empty_moments(_below("optimizer.", tensors))
                parts = {f"optimizer.{n}": value for n, value in moments.items() if f"optimizer.{n}" not in tensors}
                read_parts(folder / _PARTS, parts, self.part_sum.ranks)
                tensors |= parts
            self.optimizers.load_state(_below("optimizer.", tensors))
            for name, module in self.task.auxiliary.items():
                found = _below(f"auxiliary.{name}.", tensors)
                check_tensors(module.state_dict(), found, folder / _TENSORS)
                module.load_state_dict(found)
            step, threads, version = int(state["step"]), state["num_threads"], state["torch"]
        except (InputNotFoundError, CheckpointError, KeyError, RuntimeError, ValueError, TypeError) as error:
            cause = f"{error.what}: {error.cause}" if isinstance(error, LdmError) else first_line(error)
            remedy = "it belongs to another model or recipe: choose another --out or --resume"
            raise CheckpointError(f"cannot continue from '{folder}'", cause, remedy) from error
        for kind, values in (("sum", self.meter.sums), ("count", self.meter.counts)):
            values |= {n: v.to(self.device) for n, v in _below(f"meter.{kind}.", tensors).items()}
        self.step = step
        for what, then, now in (
            ("the number of threads", threads, torch.get_num_threads()),
            ("the version of torch", version, torch.__version__),
        ):
            if then != now:
                self.run.warn(f"{what} was {then} and is now {now}: results may differ in the last bits")


def _held(task: Task[Any], config: TrainConfig, device: torch.device, ranks: Ranks) -> Weights:
    """Bring the task's modules to the device, as the recipe says."""
    trained = {**task.modules, **task.auxiliary}
    if device.type == "cpu" and not config.compile:
        for module in trained.values():
            tune_for_cpu(module)
    if config.strategy == "sharded" and ranks.world_size > 1:
        from ldm_cli.training.sharded_weights import Shards  # takes seconds to import

        return Shards(task.modules, task.auxiliary, device, ranks)
    for module in trained.values():
        module.to(device)
        if config.channels_last:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if config.compile:
            compile_regions(module)
    return Weights(trained, ranks)


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
