"""The state of one run, and one step of it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_cli.errors import CheckpointError, DivergedError, InputNotFoundError, LdmError, StorageError, first_line
from ldm_cli.formats.json_file import read_json, write_json
from ldm_cli.formats.model_folder import check_tensors
from ldm_cli.formats.weight_files import read_tensors, write_tensors
from ldm_cli.storage import megabytes
from ldm_cli.training.checkpoint import checkpoint_name, checkpoints, commit_folder, prune
from ldm_cli.training.config import TrainConfig
from ldm_cli.training.ema import ExponentialMovingAverage
from ldm_cli.training.optim import GuardedOptimizers, learning_rate
from ldm_cli.training.run_folder import RunFolder
from ldm_cli.training.task import Task

_TENSORS, _STATE = "training.safetensors", "state.json"
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
    ) -> None:
        self.task, self.config, self.run, self.device = task, config, run, device
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
        self.buffers = [buffer for module in trained.values() for buffer in module.buffers()]
        self.meter = _Meter()
        self.step = 0
        self.saved_step: int | None = None

    def advance(self, batch: Any) -> None:
        """One optimizer step on the global batch."""
        step, config = self.step + 1, self.config
        buffers = [buffer.clone() for buffer in self.buffers]
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
        # Batch statistics of a skipped step may not be finite either.
        for buffer, before in zip(self.buffers, buffers, strict=True):
            buffer.copy_(torch.where(kept > 0, buffer, before))
        if self.ema is not None:
            self.ema.update(step, kept)
        main = next(iter(self.task.modules))
        grad_norms = {("grad_norm" if name == main else f"grad_norm/{name}"): n for name, n in norms.items()}
        self.meter.add({"loss": loss_sum, **total, **grad_norms}, kept)
        self.meter.add({"skipped": 1.0 - kept}, torch.ones_like(kept))
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
                "lower train.lr or raise train.warmup_steps; the last checkpoint is sound",
            )

    def save(self) -> None:
        """Commit a checkpoint of this step, over a damaged one if there is any, and delete the oldest.

        Raises:
            OutputError, StorageError: it cannot be written; the older ones are as they were.
        """
        if self.step == self.saved_step:
            return
        num_bytes = self.num_checkpoint_bytes()
        target = self.run.checkpoints / checkpoint_name(self.step)
        self._expect_room(num_bytes, "a checkpoint")
        self.run.sync_metrics()
        commit_folder(target, self._write, replace=True, linked=self.run.frozen, num_bytes=num_bytes)
        self.saved_step = self.step
        prune(self.run.checkpoints, self.config.keep_checkpoints)

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
        self.task.export(folder / "model")
        if self.ema is not None:
            with self.ema.averaged():
                self.task.export(folder / "ema")
        tensors = {f"optimizer.{name}": value for name, value in self.optimizers.state().items()}
        tensors |= {f"meter.sum.{name}": value for name, value in self.meter.sums.items()}
        tensors |= {f"meter.count.{name}": value for name, value in self.meter.counts.items()}
        for name, module in self.task.auxiliary.items():
            tensors |= {f"auxiliary.{name}.{key}": value for key, value in module.state_dict().items()}
        write_tensors(folder / _TENSORS, tensors)
        facts = {"step": self.step, "num_threads": torch.get_num_threads(), "torch": torch.__version__}
        write_json(folder / _STATE, facts)

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
            tensors, state = read_tensors(folder / _TENSORS), read_json(folder / _STATE)
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


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
