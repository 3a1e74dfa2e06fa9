"""The state of one run, and one step of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ldm_cli.core.compiling import compile_regions, eagerly, should_compile
from ldm_cli.core.cpu import tune_for_cpu
from ldm_cli.core.first_nonfinite import first_nonfinite
from ldm_cli.core.precision import autocast
from ldm_cli.errors import DivergedError, WorkerError
from ldm_cli.training.background import Background
from ldm_cli.training.config import TrainConfig
from ldm_cli.training.ema import ExponentialMovingAverage
from ldm_cli.training.figure_means import FigureMeans
from ldm_cli.training.gradient_sum import gradient_sum
from ldm_cli.training.host_copy import host_copy, mark
from ldm_cli.training.optim import GuardedOptimizers, learning_rate
from ldm_cli.training.ranks import Ranks
from ldm_cli.training.run_folder import RunFolder
from ldm_cli.training.running_statistics import RunningStatistics
from ldm_cli.training.skipped_steps import SkippedSteps
from ldm_cli.training.task import Task, sample_names
from ldm_cli.training.weights import Weights

T = TypeVar("T")

_WORTH_COMPILING = 1000
"""Steps of a run from which on compiling, which takes minutes, is expected to pay off."""


class Trainer:
    """Weights, moments, averages and running statistics of a run, and the step that advances them.

    Attributes:
        step: optimizer steps so far.
        saved_step: step of the newest checkpoint of this run, written or being written; None before the first.
        saves: the save that is under way.
    """

    def __init__(
        self, task: Task[Any], config: TrainConfig, run: RunFolder, device: torch.device, ranks: Ranks
    ) -> None:
        self.task, self.config, self.run, self.device, self.ranks = task, config, run, device, ranks
        self.parts_per_rank = config.parts_per_rank(ranks.world_size)
        self.modules: Mapping[str, nn.Module] = {**task.modules, **task.auxiliary}
        self.weights = _placed(task, config, device, ranks, run.log)
        self._frozen = [part for module in self.modules.values() for part in module.modules() if _is_frozen(part)]
        self.optimizers = GuardedOptimizers(self.weights, config, device)
        self.ema: ExponentialMovingAverage | None = None
        if config.ema_decay is not None:
            parameters = [p for name in task.modules for p in self.weights.parameters[name].values()]
            trained = [p for p in parameters if p.requires_grad]
            self.ema = ExponentialMovingAverage(trained, config.ema_decay, config.ema_warmup)
        self.statistics = RunningStatistics(self.modules.values())
        self.means = FigureMeans()
        self.skipped = SkippedSteps()
        self.step = 0
        self.saved_step: int | None = None
        self.num_skipped_in_row = 0
        """Steps that were skipped just before the last one whose figures were read, itself included."""
        self._last_part: Any = None
        self.saves = Background()

    def advance(self, batch: Any) -> None:
        """One optimizer step on this rank's part of the global batch."""
        step, num_parts = self.step + 1, self.parts_per_rank * self.ranks.world_size
        total = gradient_sum(self.weights, self.config)
        self.statistics.begin_step()
        with self.autocast():
            parts = self.task.parts(batch, self.parts_per_rank)
        figures: dict[str, Tensor] = {}
        for part in parts:
            with self.autocast():
                loss, figures = self.task.loss(part, step)
            (loss.float() * self.optimizers.loss_scale).backward()  # type: ignore[no-untyped-call]
            figures = {"loss": loss, **figures}
            values = torch.stack([figure.detach().float() for figure in figures.values()])
            total.add(torch.cat([values, *self.statistics.take_change()]))
        mean = total.finish() / num_parts
        figures = dict(zip(figures, mean[: len(figures)].unbind(), strict=True))

        norms, kept = self.optimizers.step(learning_rate(self.config, step), figures["loss"], num_parts)
        self.statistics.apply(mean[len(figures) :], kept)
        if self.ema is not None:
            self.ema.update(step, kept)
        main = next(iter(self.task.modules))
        figures |= {("grad_norm" if name == main else f"grad_norm/{name}"): norm for name, norm in norms.items()}
        self.means.add(figures, kept)
        self.means.add({"skipped": 1.0 - kept}, torch.ones_like(kept))
        self.skipped.add(step, sample_names(batch), kept)
        self.step, self._last_part = step, parts[-1]

    def autocast(self, *, cached: bool = True) -> torch.autocast:
        """A context in which the networks compute as `train.precision` says.

        Args:
            cached: whether a weight is cast once; it must not change then. Those of sharded models always may.
        """
        return autocast(self.device, self.config.precision, cache_enabled=cached and not self.weights.is_sharded)

    def set_training(self, mode: bool) -> None:
        """Put the modules into training or evaluation mode; frozen parts stay in evaluation mode."""
        for module in self.modules.values():
            module.train(mode)
        for part in self._frozen:
            part.training = False

    def expect_same_weights(self) -> None:
        """Make sure that all ranks hold the same weights, by a sum over each parameter.

        Raises:
            WorkerError: they do not.
        """
        parameters = [p.detach() for p in self.weights.replicas()]
        if self.ranks.world_size == 1 or not parameters:
            return
        sums = torch.stack([p.double().sum() for p in parameters])
        rows = self.ranks.gathered(sums[None].cpu())
        # Non-finite sums that all ranks share are equal, though a NaN equals nothing.
        if not torch.allclose(rows, rows[:1].expand_as(rows), rtol=0, atol=0, equal_nan=True):
            raise WorkerError(
                f"the weights of the ranks differ at step {self.step}",
                "their machines do not compute alike",
                "continue from the last checkpoint on machines of one kind",
            )

    def begin_reading(self, with_means: bool) -> Callable[[], dict[str, float]]:
        """Begin to copy what the host has to know of the steps since the last call; all ranks call.

        Args:
            with_means: whether the means of the figures since the last line are part of it.

        Returns:
            A function that waits for the copy, reports skipped steps, and gives the means; all ranks call it, in the
            order in which they were begun. It raises `DivergedError` after more than `max_nonfinite` skipped steps.
        """
        step, means = self.step, self.means.take() if with_means else {}
        skipped, self.skipped = self.skipped, SkippedSteps()
        values = [*means.values(), *skipped.kept, self.optimizers.nonfinite_run]
        copy, arrived = host_copy(torch.stack([value.double() for value in values])), mark(self.device)

        def read() -> dict[str, float]:
            self.ranks.wait_for(arrived)
            *known, bad = copy.tolist()
            is_expected, self.num_skipped_in_row = self.config.precision == "fp16", int(bad)
            skipped.report(known[len(means) :], self.run, self.ranks, is_expected)
            if bad > self.config.max_nonfinite:
                raise DivergedError(
                    f"step {step} of '{self.run.path}'",
                    f"loss or gradient was not finite in {int(bad)} steps in a row, {self.first_nonfinite()}",
                    "lower train.lr or raise train.warmup_steps; the last checkpoint is sound, "
                    "log.txt names the samples",
                )
            return {name: value for name, value in zip(means, known, strict=False) if not math.isnan(value)}

        return read

    def first_nonfinite(self) -> str:
        """Where the loss of the last part has its first value that is not finite, in words; computes it again."""
        if self._last_part is None or self.ranks.world_size > 1:  # others do not compute with this one
            return "somewhere in the model"
        with self.autocast():
            found = first_nonfinite(self.modules, lambda: self.task.loss(self._last_part, self.step))
        return f"first in {found}" if found else "first in the loss or a gradient"

    def on_first_rank(self, act: Callable[[], T], *, averaged: bool = False, shared: bool = False) -> T | None:
        """Call `act` on rank 0, while the task's modules hold their full weights there, uncompiled; all ranks call.

        Args:
            act: must not involve other ranks, unless it is shared.
            averaged: whether the modules hold the averages of the weights, if there are any.
            shared: the other ranks call `act`, too, where they hold full weights.

        Returns:
            The result of `act`, None on ranks that do not call it.
        """
        if not (self.ranks.is_first or self.weights.is_sharded or shared):
            return None
        calls = self.ranks.is_first or (shared and not self.weights.is_sharded)
        with ExitStack() as stack:
            if averaged and self.ema is not None:
                stack.enter_context(self.ema.averaged())
            stack.enter_context(self.weights.gathered())
            stack.enter_context(eagerly())
            return act() if calls else None


def _is_frozen(module: nn.Module) -> bool:
    """Whether none of the module's parameters is trained: its running statistics must not move either."""
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def is_compiled_on(device: torch.device, config: TrainConfig, tell: Callable[[str], None]) -> bool:
    """Whether models are compiled; see `should_compile`."""
    return should_compile(config.compile, device, config.steps >= _WORTH_COMPILING, tell)


def _placed(
    task: Task[Any], config: TrainConfig, device: torch.device, ranks: Ranks, tell: Callable[[str], None]
) -> Weights:
    """Bring the task's modules to the device, as the recipe says."""
    trained = {**task.modules, **task.auxiliary}
    is_sharded = config.strategy == "sharded" and ranks.world_size > 1
    is_compiled = not is_sharded and is_compiled_on(device, config, tell)
    if device.type == "cpu" and not is_compiled:
        for module in trained.values():
            tune_for_cpu(module)
    if is_sharded:
        from ldm_cli.training.sharded_weights import ShardedWeights  # takes seconds to import

        return ShardedWeights(task.modules, task.auxiliary, device, ranks)
    for module in trained.values():
        module.to(device)
        if config.channels_last:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if is_compiled:
            compile_regions(module)
    return Weights(trained, ranks)
