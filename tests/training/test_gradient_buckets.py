"""Gradients summed during backward: those that a sum after it gives, and an end when a rank dies within one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ldm_cli.errors import WorkerError
from ldm_cli.reporting import SilentReporter
from ldm_cli.training import distributed, gradient_buckets, weights
from ldm_cli.training.config import TrainConfig
from ldm_cli.training.distributed import _ConnectedRanks, joined
from ldm_cli.training.gradient_buckets import GradientBuckets
from ldm_cli.training.ranks import Ranks
from ldm_cli.training.run_folder import RunFolder
from ldm_cli.training.trainer import Trainer

from ..faults.runs import configured
from .forked import ForkedRanks
from .toy import ToyTask, data

CPU = torch.device("cpu")


class SumAfterBackward:
    """What `GradientBuckets` does, without overlap."""

    def __init__(self, parameters: Iterator[nn.Parameter], ranks: Ranks) -> None:
        self.parameters, self.ranks = list(parameters), ranks

    def begin(self, num_passes: int) -> None:
        """Nothing to prepare."""

    def end_pass(self) -> None:
        """Nothing to count."""

    def finish(self) -> None:
        self.ranks.sum_in_place([p.grad for p in self.parameters if p.grad is not None])


class Branching(nn.Module):
    """Kernels in another memory order, a parameter used twice, one never, and some in even steps alone."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.kernel = body, nn.Conv2d(4, 4, 3, padding=1)
        self.twice, self.never = nn.Linear(4, 4), nn.Linear(3, 3)

    def forward(self, x: Tensor, step: int = 0) -> Tensor:
        if step % 2 == 0:
            x = x + self.kernel(x[..., None, None].expand(-1, -1, 2, 2)).mean(dim=(2, 3))
        return self.body(self.twice(self.twice(x)))


class BranchingTask(ToyTask):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.model = Branching(self.model)
        self.modules = {"model": self.model}

    def loss(self, part: tuple[Tensor, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        x, y = part
        return (self.model(x, step) - y).square().mean() + 1e3 * self.critic(y).square().mean(), {}


def trained(path: Path, config: TrainConfig, ranks: Ranks) -> list[Tensor]:
    """What this rank holds of weights and averages after some steps."""
    trainer = Trainer(BranchingTask(), config, RunFolder(path, SilentReporter()), CPU, ranks)
    for step in range(config.steps):
        trainer.advance(tuple(side.chunk(ranks.world_size)[ranks.rank] for side in data(step)))
    weights = [p.detach() for held in trainer.weights.parameters.values() for p in held.values()]
    assert trainer.ema is not None
    return weights + trainer.ema.average


def on_ranks(path: Path, work: Callable[[Ranks], None], world_size: int = 2) -> None:
    def joining(rank: int) -> int:
        with joined(CPU, 60.0) as ranks:
            work(ranks)
        return 0

    with ForkedRanks(joining, path, world_size) as job:
        assert job.wait() == [0] * world_size, job.words()


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_gradients_summed_during_backward_are_those_summed_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    monkeypatch.setattr(gradient_buckets, "_BUCKET_SIZE", 20)

    def work(ranks: Ranks) -> None:
        for changes in (
            {"micro_batch": 1, "max_grad_norm": 0.1},
            {"precision": "fp16", "max_grad_norm": 0.1},
            {"strategy": "sharded"},
        ):
            config = configured(steps=6, **changes)
            during = trained(tmp_path, config, ranks)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(weights, "GradientBuckets", SumAfterBackward)
                after = trained(tmp_path, config, ranks)
            for one, two in zip(during, after, strict=True):
                torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-7)

    on_ranks(tmp_path, work, world_size)


def test_buckets_start_within_the_last_backward_pass_and_wait_for_those_before_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient_buckets, "_BUCKET_SIZE", 16)
    started: list[int] = []
    begin_sum = _ConnectedRanks.begin_sum
    monkeypatch.setattr(
        _ConnectedRanks, "begin_sum", lambda self, flat: started.append(len(flat)) or begin_sum(self, flat)
    )

    def work(ranks: Ranks) -> None:
        layers = [nn.Linear(4, 4, bias=False) for _ in range(4)]
        unused = nn.Parameter(torch.ones(16))
        parameters = [layers[0].weight, unused, *(layer.weight for layer in layers[1:])]
        sums = GradientBuckets(parameters, ranks)
        sums.begin(2)
        x = torch.full((1, 4), 1.0 + ranks.rank)
        for expected in ([], [16, 16, 16]):  # the last bucket waits for the one without a gradient
            nn.Sequential(*layers)(x).sum().backward()
            assert started == expected
            sums.end_pass()
        sums.finish()
        assert started == [16] * 5
        assert unused.grad is None

    on_ranks(tmp_path, work)


def test_the_sum_of_a_parameter_that_has_no_gradient_any_more_does_not_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(ranks: Ranks) -> None:
        one, two = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        sums = GradientBuckets([one, two], ranks)
        for used in ([one, two], [one], [one, two]):
            sums.begin(1)
            torch.stack([(ranks.rank + 1) * parameter for parameter in used]).sum().backward()
            sums.end_pass()
            sums.finish()
            assert one.grad is not None
            assert one.grad.tolist() == [3.0] * 3
            assert (two.grad is not None) == (len(used) == 2)
            assert two.grad is None or two.grad.tolist() == [3.0] * 3
            one.grad = two.grad = None

    on_ranks(tmp_path, work)


def test_a_rank_killed_in_the_middle_of_a_reduction_ends_the_others_with_82(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient_buckets, "_BUCKET_SIZE", 16)
    monkeypatch.setattr(distributed, "TELLING", 0.5)
    begin_sum = _ConnectedRanks.begin_sum
    started: list[int] = []

    def begin(self: _ConnectedRanks, flat: Tensor) -> Callable[[], None]:
        started.append(len(flat))
        if self.rank == 1 and len(started) == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        return begin_sum(self, flat)

    monkeypatch.setattr(_ConnectedRanks, "begin_sum", begin)

    def work(rank: int) -> int:
        try:
            with joined(CPU, 60.0) as ranks:
                model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4)))
                sums = GradientBuckets(model.parameters(), ranks)
                while True:
                    sums.begin(1)
                    model(torch.ones(1, 4)).sum().backward()
                    sums.end_pass()
                    sums.finish()
        except WorkerError as error:
            return error.code

    began = time.monotonic()
    with ForkedRanks(work, tmp_path) as job:
        assert job.wait() == [WorkerError.code, -signal.SIGKILL], job.words()
    assert time.monotonic() - began < 30, "the time-out is 60 s"
