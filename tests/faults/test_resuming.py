"""What a second life finds: damaged and foreign checkpoints, longer recipes, time limits, signals."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm_cli.errors import CheckpointError, DivergedError, InputNotFoundError, Preempted
from ldm_cli.reporting import SilentReporter
from ldm_cli.training.checkpoint import checkpoint_name, checkpoints, problem_with
from ldm_cli.training.interruption import StopRequest
from ldm_cli.training.loop import train
from ldm_cli.training.run_folder import RunFolder

from ..training.toy import ToyTask, batches
from .runs import assert_same_run, configured, die, metrics, run, status, tensors, until


def test_metrics_are_the_same_after_resuming_between_validation_and_logging(tmp_path: Path) -> None:
    config = configured(validate_every=11, log_every=8)
    run(tmp_path / "whole", config)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", config, source=until(12, die))
    run(tmp_path / "broken", config)
    assert_same_run(tmp_path / "whole", tmp_path / "broken", 20)
    assert [line["step"] for line in metrics(tmp_path / "whole")] == [8, 11, 16, 20]
    assert metrics(tmp_path / "whole")[1].keys() == {"step", "val_loss", "val_loss_ema"}


class LateTask(ToyTask):
    """Has a figure, the number of the step, from step 5 on."""

    def loss(self, part: tuple[Tensor, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        loss, figures = super().loss(part, step)
        return loss, figures | ({"late": torch.tensor(float(step))} if step >= 5 else {})


def test_a_figure_is_averaged_over_the_steps_that_have_it_and_were_taken(tmp_path: Path) -> None:
    config = configured(log_every=7, steps=21)
    run(tmp_path, config, LateTask(poison={6, *range(8, 15)}))
    first, second, third = metrics(tmp_path)
    assert first["late"] == (5 + 7) / 2
    assert first["skipped"] == pytest.approx(1 / 7)
    assert second["skipped"] == 1
    assert second.keys() == {"step", "lr", "skipped"}
    assert (third["late"], third["skipped"]) == (sum(range(15, 22)) / 7, 0)


def test_a_late_figure_survives_resuming(tmp_path: Path) -> None:
    run(tmp_path / "whole", task=LateTask())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", task=LateTask(), source=until(6, die))
    run(tmp_path / "broken", task=LateTask())
    assert_same_run(tmp_path / "whole", tmp_path / "broken", 20)


def _damage(checkpoint: Path) -> None:
    file = checkpoint / "training.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, source=until(11, die))
    newest = tmp_path / "checkpoints" / checkpoint_name(10)
    _damage(newest)
    assert problem_with(newest) is not None
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, source=until(12, die))
    assert problem_with(newest) is None


class NormTask(ToyTask):
    """Batch norm in front, so that the state of a step is more than its parameters."""

    def __init__(self, poison: set[int] = frozenset()) -> None:  # type: ignore[assignment]
        super().__init__(poison)
        self.model = nn.Sequential(nn.BatchNorm1d(4), *self.model)
        self.modules = {"model": self.model}

    def loss(self, part: tuple[Tensor, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        x, y = part
        return super().loss((x * float("inf"), y) if step in self.poison else part, step)


def test_batch_statistics_are_averaged_saved_and_restored(tmp_path: Path) -> None:
    run(tmp_path / "whole", task=NormTask())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", task=NormTask(), source=until(12, die))
    run(tmp_path / "broken", task=NormTask())
    assert_same_run(tmp_path / "whole", tmp_path / "broken", 20)
    final = tensors(tmp_path / "whole", 20)
    assert final["model/model.safetensors:0.num_batches_tracked"] == 20, "validation must not count"


def test_a_skipped_step_leaves_batch_statistics_alone(tmp_path: Path) -> None:
    config = configured(steps=6, save_every=1, keep_checkpoints=6)
    run(tmp_path, config, NormTask(poison={3}))
    states = [tensors(tmp_path, step) for step in (2, 3)]
    name = "model/model.safetensors:0.running_mean"
    before, after = (s[f"checkpoints/{checkpoint_name(i)}/{name}"] for i, s in zip((2, 3), states, strict=True))
    assert torch.equal(before, after)
    assert torch.isfinite(tensors(tmp_path, 6)[name]).all()


def test_more_steps_at_a_constant_rate_extend_a_finished_run(tmp_path: Path) -> None:
    def described(steps: int, schedule: str = "constant") -> dict[str, Any]:
        return {"train": {"steps": steps, "lr_schedule": schedule}}

    run(tmp_path / "long", configured(steps=30))
    run(tmp_path / "grown")
    run(tmp_path / "grown", configured(steps=30))
    long, grown = tensors(tmp_path / "long", 30), tensors(tmp_path / "grown", 30)
    weights = [name for name in long if ":meter." not in name]
    assert all(torch.equal(long[name], grown[name]) for name in weights)
    with RunFolder(tmp_path / "claimed", SilentReporter()) as folder:
        folder.claim(described(20), "", {}, torch.device("cpu"))
        folder.model.mkdir()
        folder.claim(described(30), "", {}, torch.device("cpu"))
        with pytest.raises(CheckpointError, match=r"train\.steps: 30 → 20"):
            folder.claim(described(20), "", {}, torch.device("cpu"))
    with RunFolder(tmp_path / "cosine", SilentReporter()) as folder:
        folder.claim(described(20, "cosine"), "", {}, torch.device("cpu"))
        folder.model.mkdir()
        with pytest.raises(CheckpointError, match=r"train\.steps: 20 → 30"):
            folder.claim(described(30, "cosine"), "", {}, torch.device("cpu"))


def test_a_run_may_start_at_a_given_checkpoint_and_then_goes_on_from_its_own(tmp_path: Path) -> None:
    run(tmp_path / "first")
    start = tmp_path / "first/checkpoints" / checkpoint_name(15)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "second", configured(steps=40), start=start, source=until(26, die))
    assert checkpoints(tmp_path / "second/checkpoints")[0].name == checkpoint_name(20)
    resumed = ToyTask()
    run(tmp_path / "second", configured(steps=40), resumed, start=start)
    assert resumed.seen[0] == 26, "the run's own newest checkpoint counts, or it would never end under preemption"
    run(tmp_path / "whole", configured(steps=40))
    whole, second = tensors(tmp_path / "whole", 40), tensors(tmp_path / "second", 40)
    assert all(torch.equal(whole[name], second[name]) for name in whole)


def test_a_run_folder_stands_for_its_newest_sound_checkpoint(tmp_path: Path) -> None:
    run(tmp_path / "first")
    _damage(tmp_path / "first/checkpoints" / checkpoint_name(20))
    before = {file: file.read_bytes() for file in (tmp_path / "first").rglob("*") if file.is_file()}
    task = ToyTask()
    run(tmp_path / "second", configured(steps=25), task, start=tmp_path / "first")
    assert task.seen[0] == 16
    assert {file: file.read_bytes() for file in before} == before, "another run's folder is not written to"


def test_a_run_without_checkpoints_is_no_start(tmp_path: Path) -> None:
    (tmp_path / "first/checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="this run has no checkpoint"):
        run(tmp_path / "second", start=tmp_path / "first")


@pytest.mark.parametrize(("steps", "schedule", "is_low"), [(21, "cosine", True), (200, "cosine", False)])
def test_the_tail_of_a_cosine_is_warned_about(tmp_path: Path, steps: int, schedule: str, is_low: bool) -> None:
    run(tmp_path / "first")
    reporter = SilentReporter()
    with RunFolder(tmp_path / "second", reporter) as folder, StopRequest(None) as stop:
        config = configured(steps=steps, lr_schedule=schedule)
        start, device = tmp_path / "first", torch.device("cpu")
        train(ToyTask(), batches, config, folder, reporter, device=device, stop=stop, start=start)
    assert any("start_from begins a new schedule" in message for message in reporter.messages) == is_low
    assert any(message.startswith("continuing") and f"20 of {steps}" in message for message in reporter.messages)


@pytest.mark.parametrize(
    ("name", "steps", "kind", "message"),
    [
        (checkpoint_name(20), 10, CheckpointError, "at step 20, train.steps=10"),
        (checkpoint_name(20), 20, CheckpointError, "no step is left; raise train.steps, or .* with start_from"),
        ("nowhere", 40, InputNotFoundError, "nowhere"),
        ("", 40, CheckpointError, "manifest.json"),
    ],
)
def test_a_start_that_cannot_be_one_is_refused(
    tmp_path: Path, name: str, steps: int, kind: type[Exception], message: str
) -> None:
    run(tmp_path / "first")
    with pytest.raises(kind, match=message):
        run(tmp_path / "second", configured(steps=steps), start=tmp_path / "first/checkpoints" / name)
    assert checkpoints(tmp_path / "second/checkpoints") == []


def test_a_checkpoint_of_another_shape_is_refused_in_one_line(tmp_path: Path) -> None:
    run(tmp_path)
    other = ToyTask()
    other.model[0] = nn.Linear(4, 9)
    with pytest.raises(CheckpointError, match="cannot continue from") as caught:
        run(tmp_path, configured(steps=30), other)
    assert "\n" not in str(caught.value)


def test_the_time_limit_saves_and_the_next_life_ends_the_same(tmp_path: Path) -> None:
    with pytest.raises(Preempted, match="--max-time") as caught:
        run(tmp_path / "short", max_seconds=0.0)
    assert caught.value.code == 75
    assert status(tmp_path / "short")["state"] == "preempted"
    assert checkpoints(tmp_path / "short/checkpoints")[0].name == checkpoint_name(0)
    run(tmp_path / "short")
    run(tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "short", 20)


def test_a_signal_in_the_last_step_still_finishes(tmp_path: Path) -> None:
    run(tmp_path, source=until(19, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert status(tmp_path)["state"] == "finished"


def test_the_result_is_the_same_if_the_last_life_only_exports(tmp_path: Path) -> None:
    class Dying(ToyTask):
        def finalize(self) -> dict[str, float]:
            raise KeyboardInterrupt

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", task=Dying())
    late = ToyTask()
    result = run(tmp_path / "broken", task=late)
    assert late.seen == []
    del whole["images_per_second"], result["images_per_second"]
    assert result == whole
    assert {"loss", "val_loss", "lr", "final"} <= result.keys()
    assert_same_run(tmp_path / "whole", tmp_path / "broken", 20)


def test_divergence_is_told_before_the_next_checkpoint(tmp_path: Path) -> None:
    config = configured(max_nonfinite=1, save_every=4, log_every=100)
    with pytest.raises(DivergedError):
        run(tmp_path, config, ToyTask(poison={7, 8, 9}))
    assert [p.name for p in checkpoints(tmp_path / "checkpoints")] == [checkpoint_name(4)]
