"""`ldm bench` at sizes of no interest: the same work for all, counted right, in the shape that is documented."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ldm_cli.bench import input_pipeline, picture, run
from ldm_cli.bench.workload import Workload, build_model, our_step
from ldm_cli.cli.app import run as ldm
from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.autoencoder_kl_config import AutoencoderKLConfig
from ldm_cli.errors import UnavailableError
from ldm_cli.formats.save_model import save_model
from ldm_cli.recipe.load import load_recipe
from ldm_cli.reporting import SilentReporter

TINY = {
    "train-clip": ("bench/clip", ["train.batch_size=4", "clip.text_config.num_hidden_layers=1"]),
    "train-vae": ("bench/vae", ["train.batch_size=2", "data.image_size=16", "vae.layers_per_block=1"]),
    "encode-vae": ("bench/vae", ["train.batch_size=2", "data.image_size=16", "vae.layers_per_block=1"]),
    "train-unet": ("bench/unet", ["train.batch_size=2", "unet.sample_size=8", "unet.block_out_channels=[32,32,32]"]),
}


XL = [
    "text_encoder_2=x",
    "unet.addition_embed_type=text_time",
    "unet.addition_time_embed_dim=8",
    "unet.projection_class_embeddings_input_dim=58",
]


def tiny(subject: str, further: list[str] | None = None) -> Any:
    name, changes = TINY[subject]
    return load_recipe(name, [*changes, *(further or [])], expected_command=run.SUBJECTS[subject].command).recipe


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    ("subject", "changes"), [("train-clip", []), ("train-unet", []), ("train-unet", XL)], ids=["clip", "unet", "xl"]
)
def test_peers_do_the_same_work(subject: str, changes: list[str]) -> None:
    pytest.importorskip(run.SUBJECTS[subject].peer)
    options = run.BenchOptions(rounds=1, context_length=5)
    rows = run.compare(subject, tiny(subject, changes), options, 10.0, compared=True)
    assert [row["contender"] for row in rows[:2]] == ["ldm", run.SUBJECTS[subject].peer]
    assert len(rows) == 2 + (subject == "train-unet")
    assert (rows[0]["speedup"], rows[0]["memory_ratio"]) == (1.0, 1.0)
    for row in rows:
        assert row["first_loss"] == pytest.approx(rows[0]["first_loss"], rel=1e-4)
        assert row["gflop_per_unit"] == rows[0]["gflop_per_unit"]
        assert row["fraction_of_matmul"] == pytest.approx(row["gflop_per_unit"] * row["per_second"] / 10.0)
        assert row["peak_mib"] > 50


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_a_recipe_whose_tokenizer_is_not_there_yet_can_be_timed() -> None:
    words = ["train.batch_size=4", "clip.text_config.num_hidden_layers=1", "clip.vision_config.num_hidden_layers=1"]
    recipe = load_recipe("demo/clip", words).recipe
    assert recipe.clip.text_config.eos_token_id >= recipe.clip.text_config.vocab_size
    rows = run.compare("train-clip", recipe, run.BenchOptions(rounds=1), 10.0, compared=False)
    assert rows[0]["first_loss"] > 0


@pytest.mark.exhaustive
def test_compiled_contenders_do_the_same_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    name, size = TINY["train-clip"]
    recipe: Any = load_recipe(name, [*size, "clip.vision_config.num_hidden_layers=1"]).recipe
    rows = run.compare("train-clip", recipe, run.BenchOptions(rounds=1, compiled=True), 10.0, compared=True)
    names = ["ldm", "transformers", "ldm compiled", "transformers compiled"]
    assert [row["contender"] for row in rows] == names
    for row in rows:
        assert row["first_loss"] == pytest.approx(rows[0]["first_loss"], rel=1e-4)
    assert any(tmp_path.rglob("*.so")), "something was compiled"


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("subject", ["train-vae", "encode-vae"])
def test_autoencoders_are_measured(subject: str) -> None:
    (row,) = run.compare(subject, tiny(subject), run.BenchOptions(rounds=1), 10.0, compared=False)
    assert row["per_second"] == pytest.approx(2e3 / row["step_ms"])
    assert row["gflop_per_unit"] > 0


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


def test_operations_are_counted_as_torch_counts_those_of_the_peer_forward_and_backward() -> None:
    diffusers = pytest.importorskip("diffusers")
    recipe = tiny("train-unet")
    runner = our_step(Workload(recipe, context_length=5))
    unet, size = diffusers.UNet2DConditionModel(**recipe.unet.to_mapping()), recipe.unet.sample_size
    x, context = torch.randn(2, 4, size, size), torch.randn(2, 5, recipe.unet.cross_attention_dim)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        unet(x, torch.tensor([1.0, 2.0]), context).sample.sum().backward()
    assert runner.units == 2
    assert runner.facts()["flops"] == pytest.approx(counter.get_total_flops(), rel=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_published_sizes_are_measured_until_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "PUBLISHED_PIPELINE", ("bench/unet", "bench/vae"))
    monkeypatch.setattr(run, "PUBLISHED", (("train-clip", "bench/clip", {"train.batch_size": 2}),))
    monkeypatch.setattr(run, "_PUBLISHED_PICTURES", (1,))
    options, reporter = run.BenchOptions(rounds=1, steps=2), SilentReporter()
    assert [*run.published(options, 10.0, reporter)] == ["sample 1", "train-clip bench/clip"]
    monkeypatch.setattr(run, "_PUBLISHED_SECONDS", -1.0)
    assert run.published(options, 10.0, reporter) == {}
    assert "warning: no time is left for sample 1" in reporter.messages


def test_recipes_of_published_sizes_can_be_measured() -> None:
    for subject, recipe, changes in run.PUBLISHED:
        words = [f"{key}={value}" for key, value in (run._AT_ONCE | changes).items()]
        load_recipe(recipe, words, expected_command=run.SUBJECTS[subject].command)


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_loaders_readers_indexing_and_resuming_are_measured() -> None:
    rows = input_pipeline.measure(48, 1, compared=False)
    assert {row["contender"] for row in rows} == {"ldm", "ldm at epoch 100"}
    assert {row["work"] for row in rows} >= {"reading alone", "indexing", "first batch after a start"}
    assert all(row["per_second"] > 0 for row in rows)


@pytest.mark.exhaustive
def test_starts_are_measured() -> None:
    with picture.random_pipeline() as folder:
        (begun,) = picture.start(folder, 2, 1, compared=False)
    assert begun["per_second"] > 0


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


def test_every_random_layer_speaks() -> None:
    model: nn.Module = build_model(tiny("train-unet"))
    assert all(bool(parameter.any()) for parameter in model.parameters())
