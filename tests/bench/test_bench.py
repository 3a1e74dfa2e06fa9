"""`ldm bench` at sizes of no interest: the real commands are timed, counted right, in the shape that is documented."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ldm_cli.bench import data, peers, run, stages
from ldm_cli.bench.race import RaceOver
from ldm_cli.bench.stand_ins import is_complete, random_family, with_stand_ins
from ldm_cli.bench.workload import random_batch, size_of
from ldm_cli.cli.app import run as ldm
from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.autoencoder_kl_config import AutoencoderKLConfig
from ldm_cli.errors import UnavailableError, UsageError
from ldm_cli.formats.save_model import save_model
from ldm_cli.recipe.load import load_recipe
from ldm_cli.recipe.schema import TrainUnetRecipe
from ldm_cli.reporting import SilentReporter
from ldm_cli.stages import train_unet
from ldm_cli.stages.support.options import RunOptions
from ldm_cli.training.trainer import Trainer

TINY = {
    "train-clip": ["train.batch_size=4", "clip.text_config.num_hidden_layers=1"],
    "train-vae": ["train.batch_size=2", "data.image_size=16", "vae.layers_per_block=1"],
    "train-unet": [
        "train.batch_size=2",
        "unet.sample_size=8",
        "data.image_size=16",
        "unet.block_out_channels=[32,32,32]",
    ],
    "precompute": ["unet.sample_size=8", "data.image_size=16"],
}


XL = [
    "text_encoder_2=x",
    "unet.addition_embed_type=text_time",
    "unet.addition_time_embed_dim=8",
    "unet.projection_class_embeddings_input_dim=112",
]


def tiny(subject: str) -> Any:
    if subject == "train-unet XL":
        return load_recipe("bench/unet", [*TINY["train-unet"], *XL], expected_command="train-unet").recipe
    known = run.SUBJECTS[subject]
    return load_recipe(known.recipe, TINY[subject], expected_command=known.command).recipe


class CountedTurns:
    """Stands in for the turns of a race: so many, in this process."""

    def __init__(self, number: int) -> None:
        self.left, self.units = number, 0

    def done(self, units: int) -> None:
        self.units += units
        self.left -= 1
        if not self.left:
            raise RaceOver


def timed(work: Callable[..., None], number: int, *arguments: Any) -> int:
    """Run a contender in this process for a number of turns; the units that it did."""
    turns = CountedTurns(number)
    with pytest.raises(RaceOver):
        work(turns, *arguments)
    return turns.units


@pytest.mark.parametrize(
    "subject", ["train-clip", "train-vae", "train-unet", pytest.param("train-unet XL", marks=pytest.mark.exhaustive)]
)
def test_the_steps_of_the_trainer_itself_are_timed(
    subject: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, advance = [], Trainer.advance

    def noted(self: Trainer, batch: Any) -> None:
        advance(self, batch)
        steps.append((self.ema is not None, len(batch)))

    monkeypatch.setattr(Trainer, "advance", noted)
    recipe = tiny(subject)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"ema_decay": 0.9})})
    recipe = with_stand_ins(recipe, tmp_path, "cpu", 12)
    assert is_complete(recipe)
    size = recipe.train.batch_size
    assert timed(stages.train, 3, recipe, "cpu") == 3 * stages.STEPS * size
    assert steps == [(True, size)] * 3 * stages.STEPS


def test_a_benchmark_takes_the_steps_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses: dict[str, list[float]] = {"bench": [], "command": []}
    advance = Trainer.advance
    recipe = with_stand_ins(tiny("train-unet"), tmp_path, "cpu", 12)
    train = recipe.train.model_copy(update={"steps": stages.STEPS, "lr_schedule": "constant"})
    recipe = recipe.model_copy(update={"train": train})
    for name, losses_of_one in losses.items():

        def noted(self: Trainer, batch: Any, found: list[float] = losses_of_one) -> None:
            advance(self, batch)
            found.append(float(self.means.sums["loss"]))

        monkeypatch.setattr(Trainer, "advance", noted)
        if name == "bench":
            timed(stages.train, 1, recipe, "cpu")
        else:
            train_unet.run(recipe, RunOptions(out=tmp_path / "run", device="cpu"), SilentReporter())
    assert losses["bench"] == losses["command"] != []


def test_the_encoding_of_images_by_precompute_is_timed(tmp_path: Path) -> None:
    recipe = with_stand_ins(tiny("precompute").model_copy(update={"cache": None}), tmp_path, "cpu", 2 * 64)
    assert timed(stages.encode, 2, recipe, "cpu") == 2 * stages.ENCODED_IMAGES


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    "subject",
    [*(pytest.param(f"train-{name}", marks=pytest.mark.exhaustive) for name in ("clip", "vae")), "train-unet"],
)
def test_peers_are_measured_in_turn_with_the_trainer(subject: str) -> None:
    peer = run.SUBJECTS[subject].peer
    pytest.importorskip(peer)
    rows = run.measure(subject, tiny(subject), run.BenchOptions(frozenset({peer}), rounds=1), 10.0)
    last = [f"{peer} channels_last"] if subject != "train-clip" else []
    assert [row["contender"] for row in rows] == ["ldm", peer, *last]
    assert (rows[0]["speedup"], rows[0]["memory_ratio"]) == (1.0, 1.0)
    for row in rows:
        assert row["gflop_per_unit"] == rows[0]["gflop_per_unit"]
        assert row["fraction_of_matmul"] == pytest.approx(row["gflop_per_unit"] * row["per_second"] / 10.0)
        assert (row["peak_mib"] > 50, row["data"]) == (True, "random")


@pytest.mark.parametrize("subject", ["train-clip", "train-vae", "train-unet", "train-unet XL"])
def test_a_peer_has_as_many_parameters_and_operations(subject: str) -> None:
    pytest.importorskip(run.SUBJECTS[subject.removesuffix(" XL")].peer)
    recipe = tiny(subject)
    model, batch = peers.peer_model(recipe), random_batch(recipe, 2, "cpu")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        peers.loss_of(recipe, model, batch)().backward()  # type: ignore[no-untyped-call]
    parameters, flops = size_of(recipe)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert counter.get_total_flops() / 2 == pytest.approx(flops, rel=5e-3)


def test_a_recipe_is_measured_as_it_stands_if_all_of_it_is_there(tmp_path: Path) -> None:
    recipe = tiny("train-unet")
    assert not is_complete(recipe)
    complete = with_stand_ins(recipe, tmp_path, "cpu", 4)
    assert is_complete(complete)
    for missing in ({"vae": "none"}, {"text_encoder": "none"}, {"cache": "none"}):
        assert not is_complete(complete.model_copy(update=missing))
    shards = complete.data.model_copy(update={"shards": str(tmp_path / "none.tar")})
    assert not is_complete(complete.model_copy(update={"data": shards}))


def test_companions_of_a_published_unet_are_those_of_stable_diffusion() -> None:
    recipe: Any = load_recipe("unet/sd15").recipe
    with torch.device("meta"):
        family = random_family(recipe)
    vae, text = family.codec.config, family.encoder.model.config
    assert (vae.block_out_channels, vae.latent_channels, family.codec.factor) == ((128, 256, 512, 512), 4, 8)
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads) == (768, 12, 12)


@pytest.mark.usefixtures("forked")
def test_the_model_of_a_recipe_that_begins_at_trained_weights_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "matmul_gflops", lambda *_: 10.0)
    vae = AutoencoderKL(AutoencoderKLConfig(block_out_channels=(8,), norm_num_groups=4))
    save_model(tmp_path, vae.state_dict(), vae.config.to_hugging_face())
    changes = [f"start_from={tmp_path}", "vae=null", "train.batch_size=2", "data.image_size=16"]
    assert ldm(["bench", "train-vae", "bench/vae", *changes, "--rounds", "1", "--json"]) == 0
    (row,) = json.loads(capfd.readouterr().out)["train-vae"]
    assert row["per_second"] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_published_sizes_are_measured_until_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = {key: value for key, _, value in (word.partition("=") for word in TINY["train-unet"])}
    monkeypatch.setattr(
        run,
        "PUBLISHED",
        (("sample", "bench/unet", sample, 1), ("train-clip", "bench/clip", {"train.batch_size": 2}, None)),
    )
    options, reporter = run.BenchOptions(rounds=1, steps=2), SilentReporter()
    assert [*run.published(options, 10.0, reporter)] == ["sample bench/unet, 1 at a time", "train-clip bench/clip"]
    monkeypatch.setattr(run, "_PUBLISHED_SECONDS", -1.0)
    assert run.published(options, 10.0, reporter) == {}
    assert "warning: no time is left for train-clip bench/clip" in reporter.messages


def test_recipes_of_published_sizes_can_be_measured_and_unets_train_at_512_pixels_from_a_cache() -> None:
    for subject, recipe, changes, _ in run.PUBLISHED:
        words = [f"{key}={value}" for key, value in changes.items()]
        loaded = load_recipe(recipe, words, expected_command=run.SUBJECTS[subject].command).recipe
        if isinstance(loaded, TrainUnetRecipe) and subject == "train-unet":
            assert loaded.cache is not None
            assert (loaded.data.image_size, loaded.model.sample_size) == (512, 64)


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_loaders_and_readers_are_measured() -> None:
    pytest.importorskip("webdataset")
    rows = data.measure(64, 1, compared=True)
    assert [(row["work"].split(",")[0], row["contender"]) for row in rows] == [
        (work, contender)
        for work in ("256 px JPEG to 64 px", "256 px JPEG to 224 px", "reading alone")
        for contender in ("ldm", "webdataset")
    ]
    assert all(row["per_second"] > 0 for row in rows)


def test_a_peer_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match="diffusers"):
        run.check_peers("sample", ["diffusers"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "unknown subject 'nothing'"),
        (["sample", "--against", "keras"], "unknown peer 'keras'"),
        (["data", "--against", "diffusers"], "'diffusers' does not do the work of data"),
        (["precompute", "--against", "diffusers"], "'diffusers' does not do the work of precompute"),
        (["data", "bench/unet"], "bench data takes no recipe"),
    ],
)
def test_what_cannot_be_measured_is_a_line_and_2(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert ldm(["bench", *arguments]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_transformer_is_refused_by_name(tmp_path: Path) -> None:
    recipe = load_recipe("sd3/demo").recipe
    assert isinstance(recipe, TrainUnetRecipe)
    with pytest.raises(UsageError, match="ldm bench knows U-Nets"):
        with_stand_ins(recipe, tmp_path, "cpu", num_images=4)
    with pytest.raises(UsageError, match="ldm bench knows U-Nets"):
        size_of(recipe)
