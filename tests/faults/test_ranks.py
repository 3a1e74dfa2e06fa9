"""One run on several ranks: the bits and the samples of one process, and one clear end when a rank is gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_cli.cli.app import run as ldm_run
from ldm_cli.data.scenes import write_scenes
from ldm_cli.reporting import SilentReporter

from ..conftest import REPOSITORY
from ..sampling.tiny_ar import save_tiny_vq
from ..stages.tiny import RESNET, ar_recipe, clip_recipe, vae_recipe, vq_recipe
from ..stages.tiny_xl import save_tiny_xl, xl_recipe
from ..training.forked import ForkedRanks
from .lives import _session
from .matrix import different
from .runs import metrics, status, tensors

ELASTIC = {"steps": 4, "batch_size": 16, "save_every": 2, "ema_decay": 0.9, "lr": 1e-2, "deterministic": "elastic"}
ADVERSARIAL = {"adversarial_weight": 0.5, "discriminator_channels": 8, "discriminator_layers": 2}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, 40, 32, 0, SilentReporter(), val_samples=6, shard_samples=16)
    return folder


def arguments(recipe: dict[str, Any], out: Path, *more: str) -> list[str]:
    file = out.parent / f"{out.name}.json"
    file.write_text(json.dumps(recipe))
    return [recipe["command"], str(file), "--out", str(out), "--device", "cpu", "--data-trace", f"{out}.trace", *more]


def trained(recipe: dict[str, Any], out: Path, world_size: int, *more: str) -> Path:
    """The run folder after `world_size` ranks, started as torchrun starts them, have trained to the end."""
    given, logs = arguments(recipe, out, *more), out.parent / f"{out.name}.logs"
    logs.mkdir(exist_ok=True)
    with ForkedRanks(lambda rank: ldm_run(given), logs, world_size) as job:
        assert job.wait() == [0] * world_size, job.words()
    return out


def trace(out: Path) -> str:
    text = Path(f"{out}.trace").read_text()
    assert text.startswith("1 train-")
    return text


def test_elastic_training_has_the_same_bits_and_samples_on_one_and_two_ranks(scenes: Path, tmp_path: Path) -> None:
    recipe = vae_recipe(scenes, loss=ADVERSARIAL, data={"flip_probability": 0.5}, **ELASTIC)
    one, two = (trained(recipe, tmp_path / str(count), count) for count in (1, 2))
    assert different(one, two) is None
    assert trace(one) == trace(two)


@pytest.mark.exhaustive
def test_a_codebook_has_the_same_bits_on_one_and_two_ranks(scenes: Path, tmp_path: Path) -> None:
    """Its means are of the whole batch, and a code starts again at the same vector wherever that is."""
    recipe = vq_recipe(scenes, {"restart_below": 0.5}, data={"flip_probability": 0.5}, **ELASTIC)
    one, two = (trained(recipe, tmp_path / str(count), count) for count in (1, 2))
    assert different(one, two) is None
    assert trace(one) == trace(two)


def test_a_model_of_tokens_has_the_same_bits_on_one_and_two_ranks(scenes: Path, tmp_path: Path) -> None:
    save_tiny_vq(tmp_path / "vq")
    recipe = ar_recipe(scenes, tmp_path / "vq", data={"flip_probability": 0.5}, **ELASTIC)
    one, two = (trained(recipe, tmp_path / str(count), count) for count in (1, 2))
    assert different(one, two) is None
    assert trace(one) == trace(two)


@pytest.mark.slow
def test_sharded_ranks_log_the_losses_of_one_to_rounding(scenes: Path, tmp_path: Path) -> None:
    save_tiny_vq(tmp_path / "vq")
    train = ELASTIC | {"deterministic": "run", "lr": 1e-3, "log_every": 1}
    recipe = ar_recipe(scenes, tmp_path / "vq", **train)
    one = trained(recipe, tmp_path / "one", 1)
    recipe["train"]["strategy"] = "sharded"
    two = trained(recipe, tmp_path / "two", 2)
    losses = [[line["loss"] for line in metrics(run) if "loss" in line] for run in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert len(losses[0]) == 4


@pytest.mark.slow
def test_without_elastic_two_ranks_learn_the_codebook_of_one_to_rounding(scenes: Path, tmp_path: Path) -> None:
    recipe = vq_recipe(scenes, {"restart_below": 0.5}, **ELASTIC | {"deterministic": "run", "steps": 3, "lr": 1e-3})
    one, two = (trained(recipe, tmp_path / str(count), count) for count in (1, 2))
    books = [
        tensors(run, 3)["model/diffusion_pytorch_model.safetensors:quantize.embedding.weight"] for run in (one, two)
    ]
    torch.testing.assert_close(books[0], books[1], rtol=1e-3, atol=1e-5)


@pytest.mark.exhaustive
def test_clip_has_the_same_bits_on_one_two_and_four_ranks(scenes: Path, tmp_path: Path) -> None:
    recipe = clip_recipe(scenes, RESNET, optimizer="muon", **ELASTIC)  # which leaves what is no matrix to AdamW
    one, two, four = (trained(recipe, tmp_path / str(count), count) for count in (1, 2, 4))
    assert different(one, two) is None
    assert different(one, four) is None
    assert trace(one) == trace(two) == trace(four)


@pytest.mark.slow
def test_adapters_of_all_networks_have_the_same_bits_on_one_and_two_ranks(scenes: Path, tmp_path: Path) -> None:
    save_tiny_xl(tmp_path / "xl")
    lora = {"rank": 2, "targets": ["all"], "conv_rank": 2, "text_encoder": True, "dropout": 0.1, "dora": True}
    recipe = xl_recipe(scenes, {}, **ELASTIC | {"batch_size": 4, "steps": 3})
    for name in ("unet", "vae", "text_encoder"):
        del recipe[name]
    recipe |= {"start_from": str(tmp_path / "xl"), "lora": lora}
    recipe["data"]["val_shards"] = None
    one, two = (trained(recipe, tmp_path / str(count), count) for count in (1, 2))
    assert different(one, two) is None
    assert trace(one) == trace(two)


@pytest.mark.slow
def test_without_elastic_two_ranks_log_the_losses_of_one_to_rounding(scenes: Path, tmp_path: Path) -> None:
    recipe = vae_recipe(scenes, optimizer="muon", **ELASTIC | {"deterministic": "run", "lr": 1e-3})
    one, two = (trained(recipe, tmp_path / str(count), count) for count in (1, 2))
    for before, after in zip(metrics(one), metrics(two), strict=True):
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)
    assert trace(one) == trace(two)


@pytest.mark.exhaustive
def test_workers_change_neither_bits_nor_samples(scenes: Path, tmp_path: Path) -> None:
    recipe = vae_recipe(scenes, data={"flip_probability": 0.5}, **ELASTIC)
    none, one, three = (trained(recipe, tmp_path / str(n), 2, f"data.num_workers={n}") for n in (0, 1, 3))
    assert different(none, one) is None
    assert different(none, three) is None
    assert trace(none) == trace(one) == trace(three)


def test_a_rank_with_another_recipe_is_refused(scenes: Path, tmp_path: Path) -> None:
    given = arguments(vae_recipe(scenes, **ELASTIC), tmp_path / "run")
    with ForkedRanks(lambda rank: ldm_run([*given, f"seed={rank}"]), tmp_path) as job:
        assert job.wait() == [2, 2]
        assert "rank 1 of 2 has another recipe: seed than rank 0: '1' instead of '0'" in job.words()[0]
    assert not (tmp_path / "run/checkpoints").exists()


class Launched:
    """`ldm … --nproc 2` with a time-out of 4 s, in a session of its own."""

    def __init__(self, given: list[str]) -> None:
        command = [sys.executable, "-m", "ldm_cli", *given, "--nproc", "2", "train.rank_timeout=4"]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def at(self, out: Path, step: int) -> Launched:
        """Returns once the checkpoint of `step` is there."""
        while not (out / "status.json").exists() or status(out).get("step", 0) < step:
            assert self.process.poll() is None, self.end()
            time.sleep(0.01)
        return self

    def rank(self, number: int) -> int:
        """Process id of a rank."""
        launcher = self.process.pid
        for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
            if f"RANK={number}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                return int(child)
        raise AssertionError(f"no rank {number}")

    def end(self) -> tuple[int, str]:
        """Exit code, and the last line on stderr; no process is left."""
        _, said = self.process.communicate(timeout=300)
        deadline = time.monotonic() + 15
        while (left := _session(self.process.pid)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert left == []
        return self.process.returncode, (said.splitlines() or [""])[-1]


@pytest.fixture
def launched() -> Iterator[list[Launched]]:
    programs: list[Launched] = []
    yield programs
    for program in programs:
        for pid in _session(program.process.pid):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def undisturbed(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of the recipe beside it."""
    recipe = vae_recipe(
        scenes, data={"num_workers": 1}, **ELASTIC | {"steps": 12, "save_every": 3, "optimizer": "muon"}
    )
    return trained(recipe, tmp_path_factory.mktemp("one") / "one", 1)


@pytest.mark.slow
@pytest.mark.longest
@pytest.mark.parametrize(
    ("number", "victim", "code", "message"),
    [
        pytest.param(signal.SIGTERM, None, 75, "received SIGTERM; checkpoint saved", marks=pytest.mark.exhaustive),
        (signal.SIGKILL, 1, 82, "rank 1 of 2 was killed by SIGKILL"),
        pytest.param(
            *(signal.SIGSTOP, 0, 82, "rank 0 of 2 is lost: it has sent nothing for 4 s"), marks=pytest.mark.exhaustive
        ),
    ],
)
def test_a_job_that_loses_a_rank_ends_with_one_line_and_continues_to_the_bits_of_one_process(
    undisturbed: Path,
    tmp_path: Path,
    launched: list[Launched],
    number: int,
    victim: int | None,
    code: int,
    message: str,
) -> None:
    recipe = json.loads(undisturbed.with_suffix(".json").read_text())
    given = arguments(recipe, out := tmp_path / "two")
    launched.append(program := Launched(given).at(out, 3))
    os.kill(program.process.pid if victim is None else program.rank(victim), number)
    ended, line = program.end()
    assert ended == code
    assert message in line
    trained(recipe, out, 2)
    assert different(undisturbed, out) is None
    assert trace(undisturbed) == trace(out)
