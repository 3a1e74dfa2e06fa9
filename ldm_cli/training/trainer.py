"""The state of one run, and one step of it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm_cli.errors import CheckpointError, DivergedError, StorageError
from ldm_cli.training.checkpoint import checkpoint_name, commit_folder, prune
from ldm_cli.training.config import TrainConfig
from ldm_cli.training.ema import ExponentialMovingAverage
from ldm_cli.training.optim import GuardedOptimizers, learning_rate
from ldm_cli.training.run_folder import RunFolder
from ldm_cli.training.task import Task

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
        """Commit a checkpoint of this step, over a damaged one if there is any, and delete the oldest."""
        if self.step == self.saved_step:
            return
        self.check_room()
        commit_folder(self.run.checkpoints / checkpoint_name(self.step), self._write, replace=True)
        self.saved_step = self.step
        prune(self.run.checkpoints, self.config.keep_checkpoints)

    def check_room(self) -> None:
        """Make sure that the next checkpoint finds room.

        Raises:
            StorageError: the disk has less room than the trained modules and their optimizer state take.
        """
        modules = [*self.task.modules.values(), *self.task.auxiliary.values()]
        needed = 3 * sum(p.nbytes for module in modules for p in module.parameters())  # and two moments each
        needed += 0 if self.ema is None else sum(average.nbytes for average in self.ema.average)
        free = shutil.disk_usage(self.run.path).free
        if free < needed:
            raise StorageError(
                f"no room for a checkpoint in '{self.run.checkpoints}'",
                f"it takes {needed / 2**20:.0f} MiB, and {free / 2**20:.0f} MiB are free",
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
        training, state = folder / "training.safetensors", folder / "state.json"
        save_file({name: value.contiguous() for name, value in tensors.items()}, training)
        facts = {
            "step": self.step,
            "num_threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        state.write_text(json.dumps(facts, indent=1) + "\n")
        shutil.copymode(state, training)  # safetensors writes 0600, whatever the umask

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
                f"cannot continue from '{folder}'",
                str(error).splitlines()[0],
                "delete it, or choose another --out",
            ) from error
        for kind, values in (("sum", self.meter.sums), ("count", self.meter.counts)):
            values |= {n: v.to(self.device) for n, v in _below(f"meter.{kind}.", tensors).items()}
        self.step = state["step"]
        for what, now in (("num_threads", torch.get_num_threads()), ("torch", torch.__version__)):
            if state[what] != now:
                self.run.warn(f"{what} was {state[what]} and is now {now}: results may differ in the last bits")


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
