"""Runs whose weights are cut among the ranks: the numbers, files and ends of runs whose ranks hold them whole."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm_cli.cli.app import run as ldm_run
from ldm_cli.data.scenes import write_scenes
from ldm_cli.errors import LdmError, WorkerError
from ldm_cli.reporting import SilentReporter
from ldm_cli.training import distributed, sharded_files
from ldm_cli.training import sharded_weights as shards
from ldm_cli.training.checkpoint import checkpoint_name, checkpoints, problem_with
from ldm_cli.training.config import TrainConfig
from ldm_cli.training.distributed import joined
from ldm_cli.training.interruption import StopRequest
from ldm_cli.training.loop import train
from ldm_cli.training.ranks import Ranks
from ldm_cli.training.run_folder import RunFolder

from ..faults.runs import assert_same_run, configured, metrics, tensors
from ..stages.tiny import clip_recipe, unet_recipe, vae_recipe
from ..stages.tiny_sd3 import save_tiny_sd3, sd3_recipe
from .forked import ForkedRanks
from .toy import ToyTask, data

CPU = torch.device("cpu")
SHARDED = configured(strategy="sharded", log_every=1, micro_batch=3, validate_every=10, batch_size=12)


def training(
    path: Path,
    config: TrainConfig,
    world_size: int,
    poison: set[int] = frozenset(),  # type: ignore[assignment]
    frozen: int | None = None,
) -> ForkedRanks:
    """Ranks that train in `path` to `config.steps`, but for the layer `frozen`."""

    def work(rank: int) -> int:
        def batches(start: int, end: int) -> Iterator[tuple[Tensor, Tensor]]:
            for step in range(start, end):
                x, y = data(step)
                yield x.chunk(world_size)[rank], y.chunk(world_size)[rank]

        run = RunFolder(path, SilentReporter())
        try:
            with StopRequest(None) as stop, joined(CPU, 60.0) as ranks, run if rank == 0 else nullcontext():
                ranks.wait()
                task: Any = ToyTask(poison)
                if frozen is not None:
                    task.model[frozen].requires_grad_(False)
                train(task, batches, config, run, SilentReporter(), device=CPU, stop=stop, ranks=ranks)
        except LdmError as error:
            os.write(2, str(error).encode())
            return error.code
        return 0

    logs = path.parent / f"{path.name}.logs"
    logs.mkdir(exist_ok=True)
    return ForkedRanks(work, logs, world_size)


def trained(path: Path, config: TrainConfig, world_size: int, **options: Any) -> Path:
    """The run in `path` after its ranks have trained; `options` as in `training`."""
    with training(path, config, world_size, **options) as job:
        assert job.wait() == [0] * world_size, job.words()
    return path


def assert_close_runs(one: Path, two: Path) -> None:
    for before, after in zip(metrics(one), metrics(two), strict=True):
        assert before == pytest.approx(after, rel=1e-5)
    left = {n: t for n, t in tensors(one, 20).items() if "/parts/" not in n and ":optimizer." not in n}
    right = tensors(two, 20)
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=1e-5, atol=1e-6)


def test_two_sharded_ranks_train_as_two_that_hold_everything(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", SHARDED.model_copy(update={"strategy": "replicated"}), 2, poison={4})
    assert_close_runs(trained(tmp_path / "cut", SHARDED, 2, poison={4}), whole)


@pytest.mark.parametrize("layer", [0, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_a_frozen_layer_stays_as_it_is_where_weights_are_cut(tmp_path: Path, layer: int) -> None:
    whole = trained(tmp_path / "whole", SHARDED.model_copy(update={"strategy": "replicated"}), 2, frozen=layer)
    cut = trained(tmp_path / "cut", SHARDED, 2, frozen=layer)
    assert_close_runs(cut, whole)
    before, after = ToyTask().model.state_dict(), load_file(cut / "model/model.safetensors")
    kept = {name for name in before if torch.equal(before[name], after[name])}
    assert kept == {f"{layer}.weight", f"{layer}.bias"}


@pytest.mark.slow
def test_a_sharded_run_that_was_stopped_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", SHARDED, 2)
    trained(tmp_path / "halves", SHARDED.model_copy(update={"steps": 10}), 2)
    assert_same_run(whole, trained(tmp_path / "halves", SHARDED, 2), 20)


@pytest.mark.slow
def test_a_rank_killed_while_parts_are_written_ends_the_job_and_the_older_checkpoint_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saved = sharded_files.save, []

    def fatal(*given: Any, **options: Any) -> Any:
        saved.append(given)
        if os.environ["RANK"] == "1" and len(saved) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return save(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(sharded_files, "save", fatal)
        patch.setattr(distributed, "TELLING", 0.5)
        with training(tmp_path / "run", SHARDED, 2) as job:
            assert job.wait() == [WorkerError.code, -signal.SIGKILL], job.words()
    folder = tmp_path / "run/checkpoints"
    assert [(p.name, problem_with(p)) for p in checkpoints(folder)] == [(checkpoint_name(5), None)]
    assert not list(folder.glob(".tmp-*"))
    assert_same_run(trained(tmp_path / "whole", SHARDED, 2), trained(tmp_path / "run", SHARDED, 2), 20)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.exhaustive), 3])
def test_a_sharded_run_goes_on_with_another_number_of_ranks(tmp_path: Path, world_size: int) -> None:
    config = SHARDED.model_copy(update={"micro_batch": None})
    trained(tmp_path / "other", config.model_copy(update={"steps": 10}), 2)
    assert_close_runs(trained(tmp_path / "other", config, world_size), trained(tmp_path / "whole", config, 2))


@pytest.mark.parametrize("kind", [pytest.param("unet", marks=pytest.mark.exhaustive), "transformer"])
def test_a_denoiser_cut_into_many_units_trains_as_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    scenes = tmp_path / "scenes"
    write_scenes(scenes, 20, 32, 0, SilentReporter(), val_samples=4)
    train = {"steps": 2, "gradient_checkpointing": True, "channels_last": False, "ema_decay": 0.9}
    if kind == "unet":
        parts = {"clip": clip_recipe(scenes, steps=1), "vae": vae_recipe(scenes, steps=1)}
        for name, recipe in parts.items():
            commanded(recipe, tmp_path / name, 1)
        recipe = unet_recipe(scenes, *(tmp_path / name / "model" for name in parts), **train)
    else:
        recipe = sd3_recipe(scenes, save_tiny_sd3(tmp_path / "sd3"), **train)
    whole = commanded(recipe, tmp_path / "whole", 2)
    monkeypatch.setattr(shards, "_UNIT_SIZE", 500)
    recipe["train"]["strategy"] = "sharded"
    cut = commanded(recipe, tmp_path / "cut", 2)
    for before, after in zip(metrics(whole), metrics(cut), strict=True):
        assert before == pytest.approx(after, rel=1e-5)
    left, right = tensors(whole, 2), tensors(cut, 2)
    names = [name for name in left if ":optimizer." not in name]
    assert len(names) > 80
    for name in names:
        torch.testing.assert_close(left[name], right[name], rtol=1e-5, atol=1e-5)


def commanded(recipe: dict[str, Any], out: Path, world_size: int) -> Path:
    """The run folder after `world_size` ranks, started as torchrun starts them, have trained to the end."""
    file = out.with_suffix(".json")
    file.write_text(json.dumps(recipe))
    given = [recipe["command"], str(file), "--out", str(out), "--device", "cpu"]
    logs = out.with_suffix(".logs")
    logs.mkdir()
    with ForkedRanks(lambda rank: ldm_run(given), logs, world_size) as job:
        assert job.wait() == [0] * world_size, job.words()
    return out


def test_a_parameter_with_two_names_is_refused() -> None:
    layer = nn.Linear(4, 4)
    tied = nn.Sequential(layer, nn.Sequential(layer))
    with pytest.raises(ValueError, match=r"'1\.0\.weight' and '0\.weight' are one parameter"):
        shards.ShardedWeights({"model": tied}, {}, CPU, Ranks())


@pytest.mark.parametrize("other", [{"deterministic": "elastic"}, {"optimizer": "muon"}])
def test_what_needs_whole_gradients_is_refused_where_weights_are_cut(other: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="strategy=sharded"):
        TrainConfig.model_validate({"steps": 1, "batch_size": 1, "strategy": "sharded", **other})
