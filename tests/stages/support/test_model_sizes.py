"""What no machine can hold is refused before anything is allocated; what fits is not."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ldm_cli.cli.app import run
from ldm_cli.errors import RecipeError, as_ldm_error
from ldm_cli.recipe.load import load_recipe
from ldm_cli.reporting import SilentReporter
from ldm_cli.stages.support import model_sizes
from ldm_cli.stages.support.model_sizes import expect_memory, memory_bytes, training_bytes
from ldm_cli.stages.train_vae import parameters
from ldm_cli.training import saving
from ldm_cli.training.config import TrainConfig
from ldm_cli.training.ranks import Ranks
from ldm_cli.training.run_folder import RunFolder
from ldm_cli.training.trainer import Trainer

CPU = torch.device("cpu")
BLOCKS = (
    "down_block_types: [DownEncoderBlock2D, DownEncoderBlock2D], up_block_types: [UpDecoderBlock2D, UpDecoderBlock2D]"
)
VAE = ["name=x", "data.shards=x.tar", f"vae={{block_out_channels: [16, 16], norm_num_groups: 8, {BLOCKS}}}"]
TRAIN = ["train.steps=1", "train.batch_size=1"]


def recipe(*changes: str) -> Any:
    return load_recipe(None, [*VAE, *TRAIN, *changes], expected_command="train-vae").recipe


def expect(*changes: str, ranks: int) -> None:
    its_recipe = recipe(*changes)
    expect_memory(its_recipe, parameters(its_recipe, []), CPU, ranks, reads_images=True)


def test_what_fits_is_not_refused() -> None:
    expect(ranks=1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("vae.block_out_channels=[1000000,1000000]", "vae with .* parameters"),
        ("vae.latent_channels=1048576 vae.block_out_channels=[1048576,1048576]", "vae with .* parameters"),
        ("train.batch_size=4000000 data.image_size=4096", "batch_size=4000000 images of data.image_size=4096"),
    ],
)
def test_sizes_beyond_all_memory_are_faults_of_the_recipe_told_at_once(change: str, words: str) -> None:
    started = time.process_time()
    with pytest.raises(RecipeError, match=words):
        expect(*change.split(), ranks=1)
    assert time.process_time() - started < 2


def test_memory_is_bounded_by_the_limit_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda which: (12345, -1))
    assert memory_bytes(CPU) == 12345
    with pytest.raises(RecipeError, match=r"there are 12\.06 KiB"):
        expect(ranks=1)


def test_a_gpu_does_not_help_where_main_memory_cannot_take_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    its_recipe, sizes = recipe("train.ema_decay=0.9"), parameters(recipe(), [])
    (count,) = sizes[0].values()
    for on_gpu, on_host, cause in (
        (20 * count, 16 * count, None),
        (20 * count - 1, 16 * count, "weights .*, gradients .*, optimizer .*, ema .*; .* on cuda"),
        (20 * count, 16 * count - 1, "cannot be trained on cuda: save .* on cpu"),
    ):
        monkeypatch.setattr(
            model_sizes,
            "memory_bytes",
            lambda device, on_gpu=on_gpu, on_host=on_host: on_host if device == CPU else on_gpu,
        )
        with nullcontext() if cause is None else pytest.raises(RecipeError, match=cause):
            expect_memory(its_recipe, sizes, torch.device("cuda"), 1, reads_images=False)


def test_a_save_takes_as_much_memory_as_is_counted(tmp_path: Path) -> None:
    run_folder = RunFolder(tmp_path, SilentReporter())
    model = nn.Linear(100, 1000)
    task: Any = SimpleNamespace(modules={"vae": model}, auxiliary={"discriminator": nn.Linear(10, 10)})
    config = TrainConfig(steps=1, batch_size=1, ema_decay=0.9)
    trainer = Trainer(task, config, run_folder, CPU, Ranks())
    for parameter in (*model.parameters(), *task.auxiliary["discriminator"].parameters()):
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizers.step(0.1, torch.tensor(0.0))
    snapshot = saving._snapshot(trainer)
    held = [*snapshot.tensors.values(), *snapshot.weights["vae"].values(), *snapshot.averages["vae"].values()]
    counted = training_bytes({"vae": 101_000, "discriminator": 110}, {}, config)["save"]
    assert sum(tensor.nbytes for tensor in held) == pytest.approx(counted, abs=200)


def test_sharded_ranks_hold_a_part_each(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda which: (600_000, -1))
    with pytest.raises(RecipeError):
        expect("train.batch_size=4", ranks=4)
    expect("train.batch_size=4", "data.image_size=64", "train.strategy=sharded", ranks=4)


def test_sharded_ranks_share_frozen_parameters_of_the_trained_model_alone() -> None:
    train = recipe("train.strategy=sharded", "train.ema_decay=0.9", "train.batch_size=4").train
    found = training_bytes({"vae": 1001, "discriminator": 10}, {"vae.frozen": 401, "perceptual_clip": 7}, train, 4)
    assert found == {
        "weights": 4 * (251 + 10 + 101 + 7), "gradients": 4 * 261, "optimizer": 8 * 261, "ema": 4 * 251,
        "save": 4 * (1001 + 10 + 401) + 4 * (1001 + 401) + 8 * 261
    }  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        "data.image_size=10000000",
        "train.batch_size=1000000000",
        "vae.block_out_channels=[16,1000000000]",
        "vae.layers_per_block=1000000",
        "train.batch_size=4000000 data.image_size=4096",
        "vae.block_out_channels=[1000000,1000000]",
    ],
)
def test_absurd_sizes_are_78_and_nothing_is_created(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["train-vae", *VAE_RECIPE, *change.split()]) == 78
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("ldm: error: ")
    assert last.endswith("[E-RECIPE]")
    assert list(tmp_path.iterdir()) == []


VAE_RECIPE = ["demo/vae", "name=x", "data.shards=x.tar", "--device", "cpu"]


def test_the_message_of_a_failed_allocation_says_how_much_it_was() -> None:
    error = RuntimeError(
        "[enforce fail at alloc_cpu.cpp:1] can't allocate memory: you tried to allocate 1514000000 bytes."
    )
    assert "tried to allocate 1.41 GiB" in str(as_ldm_error(error))
