"""The loop: resuming, averaging, accumulation, stopping, divergence."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ldm_cli.errors import CheckpointError, DivergedError, OutputError, Preempted
from ldm_cli.reporting import SilentReporter
from ldm_cli.training.checkpoint import checkpoint_name, checkpoints
from ldm_cli.training.config import TrainConfig
from ldm_cli.training.interruption import StopRequest
from ldm_cli.training.loop import train
from ldm_cli.training.optim import learning_rate
from ldm_cli.training.run_folder import RunFolder, environment
from ldm_cli.training.run_identity import recipe_changes

from ..faults.runs import die, until
from .toy import ToyTask, batches

CPU = torch.device("cpu")
CONFIG = TrainConfig(
    steps=30, batch_size=12, lr=1e-2, warmup_steps=3, ema_decay=0.9, log_every=7, save_every=5, validate_every=11
)


def run(
    path: Path,
    config: TrainConfig = CONFIG,
    task: ToyTask | None = None,
    source: Callable[[int, int], Iterator[tuple[Tensor, Tensor]]] = batches,
    start: Path | None = None,
    max_seconds: float | None = None,
) -> ToyTask:
    task = task or ToyTask()
    with RunFolder(path, SilentReporter()) as folder, StopRequest(max_seconds) as stop:
        train(task, source, config, folder, SilentReporter(), device=CPU, stop=stop, start=start)
    return task


def figures(path: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def assert_same_run(a: Path, b: Path) -> None:
    for name in (
        "model/model.safetensors",
        f"checkpoints/{checkpoint_name(30)}/ema/model.safetensors",
        f"checkpoints/{checkpoint_name(30)}/training.safetensors",
    ):
        one, two = load_file(a / name), load_file(b / name)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[k], two[k]) for k in one), name
    assert figures(a) == figures(b)


@pytest.mark.parametrize("step", [1, 4, 5, 6, 17, 29])
def test_resume_equals_uninterrupted_run(tmp_path: Path, step: int) -> None:
    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", source=until(step, die))
    resumed = run(tmp_path / "broken")
    assert resumed.seen[0] == step // 5 * 5 + 1, "more than save_every steps were recomputed"
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_the_loss_falls_and_every_figure_is_logged(tmp_path: Path) -> None:
    run(tmp_path, CONFIG.model_copy(update={"steps": 200, "log_every": 10}))
    lines = figures(tmp_path)
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert {
        "step",
        "loss",
        "lr",
        "grad_norm",
        "grad_norm/critic",
        "size",
        "skipped",
        "val_loss",
        "val_loss_ema",
    } <= lines[-1].keys()
    assert lines[-1]["step"] == 200


def test_accumulation_equals_the_whole_batch(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    run(tmp_path / "parts", CONFIG.model_copy(update={"micro_batch": CONFIG.batch_size // 3}))
    one, two = (load_file(tmp_path / p / "model/model.safetensors") for p in ("whole", "parts"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=2e-6)
    for left, right in zip(figures(tmp_path / "whole"), figures(tmp_path / "parts"), strict=True):
        assert left == pytest.approx(right, rel=1e-4)


def test_the_loop_equals_plain_torch(tmp_path: Path) -> None:
    """Same steps by hand: torch's own clipping and unfused AdamW, and the EMA's recurrence."""
    config = CONFIG.model_copy(update={"max_grad_norm": 0.1})
    run(tmp_path, config)
    task = ToyTask()
    trained = [*task.model.parameters()]
    both = [[*task.model.parameters()], [*task.critic.parameters()]]
    optimizers = [
        torch.optim.AdamW(
            [
                {"params": [p for p in ps if p.ndim > 1], "weight_decay": 0.01},
                {"params": [p for p in ps if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=1.0,
            foreach=False,
        )
        for ps in both
    ]
    average = [p.detach().clone() for p in trained]
    for step, batch in enumerate(batches(0, 30), start=1):
        task.loss(batch, step)[0].backward()
        for ps, optimizer in zip(both, optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(ps, 0.1)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            optimizer.step()
            optimizer.zero_grad()
        decay = min(0.9, (1 + step) / (10 + step))
        average = [decay * a + (1 - decay) * p.detach() for a, p in zip(average, trained, strict=True)]
    last = tmp_path / "checkpoints" / checkpoint_name(30)
    raw, ema = load_file(last / "model/model.safetensors"), load_file(last / "ema/model.safetensors")
    for (name, parameter), mean in zip(task.model.named_parameters(), average, strict=True):
        torch.testing.assert_close(raw[name], parameter.detach(), rtol=0, atol=1e-5)
        torch.testing.assert_close(ema[name], mean, rtol=0, atol=1e-5)


def test_a_finished_model_holds_the_average(tmp_path: Path) -> None:
    run(tmp_path)
    final = load_file(tmp_path / "model/model.safetensors")
    last = tmp_path / "checkpoints" / checkpoint_name(30)
    ema, raw = load_file(last / "ema/model.safetensors"), load_file(last / "model/model.safetensors")
    assert all(torch.equal(final[k], ema[k]) for k in final)
    assert not all(torch.equal(final[k], raw[k]) for k in final)


def test_a_nonfinite_step_changes_no_weight_and_no_average(tmp_path: Path) -> None:
    config = CONFIG.model_copy(
        update={"steps": 5, "log_every": 1, "save_every": 1, "keep_checkpoints": 10, "warmup_steps": 0}
    )
    run(tmp_path, config, ToyTask(poison={3}))
    before, after = (tmp_path / "checkpoints" / checkpoint_name(s) for s in (2, 3))
    for name in ("model/model.safetensors", "ema/model.safetensors"):
        one, two = load_file(before / name), load_file(after / name)
        assert all(torch.equal(one[k], two[k]) for k in one)
    moments, same = load_file(before / "training.safetensors"), load_file(after / "training.safetensors")
    assert all(torch.equal(moments[k], same[k]) for k in moments if k.startswith("optimizer.model"))
    assert [line["skipped"] for line in figures(tmp_path)] == [0, 0, 1, 0, 0]


def test_a_diverged_run_stops_with_its_last_sound_checkpoint(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"max_nonfinite": 2})
    with pytest.raises(DivergedError) as caught:
        run(tmp_path, config, ToyTask(poison=set(range(8, 30))))
    assert caught.value.code == 80
    assert [p.name for p in checkpoints(tmp_path / "checkpoints")] == [checkpoint_name(5)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_the_next_life_ends_the_same(tmp_path: Path, number: signal.Signals) -> None:
    def source(start: int, end: int) -> Iterator[tuple[Tensor, Tensor]]:
        for index, batch in enumerate(batches(start, end), start=start):
            if index == 12 and start == 0:
                os.kill(os.getpid(), number)
            yield batch

    with pytest.raises(Preempted) as caught:
        run(tmp_path / "stopped", source=source)
    assert caught.value.code == 75
    assert json.loads((tmp_path / "stopped/status.json").read_text())["state"] == "preempted"
    assert checkpoints(tmp_path / "stopped/checkpoints")[-1].name == checkpoint_name(13)
    run(tmp_path / "whole")
    run(tmp_path / "stopped", source=source)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", source=until(13, die))
    weights = tmp_path / "broken/checkpoints" / checkpoint_name(10) / "model/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    resumed = run(tmp_path / "broken")
    assert resumed.seen[0] == 6
    run(tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_no_usable_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, source=until(6, die))
    (tmp_path / "checkpoints" / checkpoint_name(5) / "manifest.json").write_text("")
    with pytest.raises(CheckpointError, match="all 1 are damaged"):
        run(tmp_path)


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run(tmp_path)
    assert [p.name for p in checkpoints(tmp_path / "checkpoints")] == [checkpoint_name(25), checkpoint_name(30)]
    assert not list(tmp_path.rglob(".tmp-*"))


def test_a_second_owner_is_refused_and_told_who_has_it(tmp_path: Path) -> None:
    child = os.fork()  # a lock of the same process would not count
    if child == 0:
        with RunFolder(tmp_path, SilentReporter()):
            signal.pause()
    while not (tmp_path / "checkpoints").exists():
        time.sleep(0.001)
    try:
        with pytest.raises(OutputError, match=f"pid {child} on "):
            RunFolder(tmp_path, SilentReporter()).__enter__()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with RunFolder(tmp_path, SilentReporter()):
        assert (tmp_path / ".lock").read_text().startswith(f"pid {os.getpid()} on ")


def test_env_json_names_the_device_in_use_and_asks_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: asked.append(device) or "a GPU")
    assert environment(CPU)["device"] != "a GPU"
    assert asked == []
    assert environment(torch.device("cuda", 1))["device"] == "a GPU"
    assert asked == [torch.device("cuda", 1)]


@pytest.mark.parametrize(("deterministic", "is_harmless"), [("run", True), ("elastic", False)])
def test_other_parts_are_the_same_run_unless_they_decide_the_sum(deterministic: str, is_harmless: bool) -> None:
    recipes = [{"train": {"deterministic": deterministic, "micro_batch": size}} for size in (4, 8)]
    harmless, harmful = recipe_changes(*recipes)
    assert (harmless, harmful)[not is_harmless] == ["train.micro_batch: 4 → 8"]
    assert (harmless, harmful)[is_harmless] == []


def test_validation_and_pictures_compute_as_the_steps_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def note(*_: object) -> dict[str, float]:
        seen.append(torch.is_autocast_enabled("cpu"))
        return {}

    monkeypatch.setattr(ToyTask, "validate", note)
    monkeypatch.setattr(ToyTask, "picture", note)
    for precision in ("bf16", None):
        run(tmp_path / str(precision), CONFIG.model_copy(update={"steps": 3, "precision": precision}))
    assert seen == [True, True, True, False, False, False], "raw weights, averages, pictures"


def test_another_recipe_in_the_folder_of_a_run_is_refused(tmp_path: Path) -> None:
    recipe = {"train": {"lr": 1e-3, "log_every": 5}}
    with RunFolder(tmp_path, SilentReporter()) as folder:
        folder.claim(recipe, "", {"data": "one"}, CPU)
        (folder.checkpoints / "step-00000005").mkdir()
    with RunFolder(tmp_path, SilentReporter()) as folder:
        folder.claim({"train": {"lr": 1e-3, "log_every": 9}}, "", {"data": "one"}, CPU)
        with pytest.raises(CheckpointError, match=r"train.lr: 0.001 → 0.002"):
            folder.claim({"train": {"lr": 2e-3, "log_every": 9}}, "", {"data": "one"}, CPU)
        with pytest.raises(CheckpointError, match="fingerprint of data: 'one' → 'two'"):
            folder.claim({"train": {"lr": 1e-3, "log_every": 9}}, "", {"data": "two"}, CPU)


def test_a_start_that_failed_leaves_its_folder_to_the_corrected_recipe(tmp_path: Path) -> None:
    with RunFolder(tmp_path, SilentReporter()) as folder:
        folder.claim({"train": {"lr": 1.0}}, "", {"data": "one", "vae": "first"}, CPU)
        folder.share(lambda frozen: (frozen / "vae").touch())
        folder.samples.mkdir()
    with RunFolder(tmp_path, SilentReporter()) as folder:
        folder.claim({"train": {"lr": 2.0}}, "", {"data": "one", "vae": "second"}, CPU)
        assert not folder.frozen.exists(), "the parts of the first recipe would be linked into each checkpoint"
        assert not folder.samples.exists()
        assert json.loads((tmp_path / "recipe.resolved.yaml").read_text())["recipe"] == {"train": {"lr": 2.0}}


def test_the_learning_rate_warms_up_and_ends_at_its_minimum() -> None:
    config = CONFIG.model_copy(update={"steps": 100, "warmup_steps": 10, "lr": 1.0, "min_lr_fraction": 0.1})
    rates = [learning_rate(config, step) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[54] == pytest.approx(0.55)  # half-way down the cosine
    assert rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[9:]))


def test_progress_moves_with_every_step(tmp_path: Path) -> None:
    steps: list[int] = []

    class Steps(SilentReporter):
        @contextmanager
        def progress(self, title: str, total: int | None, done: int = 0, unit: str = "step") -> Iterator[Any]:
            yield self

        def update(self, done: int, figures: Any = None) -> None:
            steps.append(done)

    reporter = Steps()
    with RunFolder(tmp_path, reporter) as folder, StopRequest(None) as stop:
        train(ToyTask(), batches, CONFIG, folder, reporter, device=CPU, stop=stop)
    assert sorted(set(steps)) == list(range(1, CONFIG.steps + 1))
