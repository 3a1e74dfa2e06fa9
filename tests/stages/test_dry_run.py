"""The dry run: exact counts and sizes, nothing allocated, nothing written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_cli.cli import app
from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.autoencoder_kl_config import AutoencoderKLConfig
from ldm_cli.core.models.clip import CLIPModel
from ldm_cli.core.models.clip_config import CLIPConfig
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.data.scenes import write_scenes
from ldm_cli.errors import RecipeError
from ldm_cli.formats.save_model import save_model
from ldm_cli.recipe.load import load_recipe
from ldm_cli.recipe.schema import TrainUnetRecipe, TrainVaeRecipe
from ldm_cli.recipe.train_recipe import TrainRecipe
from ldm_cli.recipe.yaml_source import parse_yaml
from ldm_cli.reporting import SilentReporter
from ldm_cli.stages.dry_run import count_parameters, dry_run
from ldm_cli.stages.measure import measure
from ldm_cli.stages.support import activation_sizes
from ldm_cli.stages.support.activation_sizes import activation_bytes
from ldm_cli.stages.support.options import RunOptions

TRAIN = ["train.steps=30", "train.batch_size=8"]
VAE = ["vae={block_out_channels: [16, 16], norm_num_groups: 8, down_block_types: [DownEncoderBlock2D,"
       " DownEncoderBlock2D], up_block_types: [UpDecoderBlock2D, UpDecoderBlock2D]}"]  # fmt: skip


def planned(command: str, *overrides: str) -> dict[str, Any]:
    base = ["name=tiny", "data.shards=shards/train-*.tar"] if command.startswith("train") else []
    loaded = load_recipe(None, [*base, *overrides], expected_command=command)
    result = dry_run(loaded.recipe, SilentReporter())
    json.dumps(result, allow_nan=False)
    assert result["recipe"] == loaded.recipe.to_mapping()
    return result


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_memory_is_counted_per_weight_and_shards_per_sample(tmp_path: Path) -> None:
    write_scenes(Path("shards"), 20, 32, 0, SilentReporter(), val_samples=3)
    result = planned("train-vae", *VAE, *TRAIN, "data.val_shards=shards/val-*.tar", "train.ema_decay=0.9")
    config = load_recipe(None, ["name=x", "data.shards=x", *VAE, *TRAIN], expected_command="train-vae").recipe
    count = sum(p.numel() for p in AutoencoderKL(config.vae).parameters())  # type: ignore[union-attr]
    assert result["parameters"] == {"vae": count}
    assert result["bytes"] == {
        "weights": 4 * count,
        "gradients": 4 * count,
        "optimizer": 8 * count,
        "ema": 4 * count,
        "save": 16 * count,
    }
    assert result["shards"] == {"num_shards": 1, "num_samples": 20, "num_val_shards": 1, "num_val_samples": 3}
    assert (result["steps_per_epoch"], result["epochs"]) == (2.5, 12.0)
    assert result["notes"] == []


def test_a_folder_that_holds_the_held_out_shards_too_is_noted() -> None:
    write_scenes(Path("shards"), 20, 32, 0, SilentReporter(), val_samples=3)
    held_out = f"data.val_shards={Path.cwd()}/shards/val-*.tar"
    note = f"data.shards holds 1 of data.val_shards, such as '{Path.cwd()}/shards/val-000000.tar': validation sees"
    assert planned("train-vae", *VAE, *TRAIN, "data.shards=shards", held_out)["notes"][0].startswith(note)


def test_total_memory_adds_activations_and_says_what_would_save_some() -> None:
    result = planned("train-vae", *VAE, *TRAIN, "train.ema_decay=0.9", "train.precision=fp32")
    memory, resident = result["memory"], result["bytes"]
    recipe = load_recipe(None, ["name=x", "data.shards=x", *VAE, *TRAIN], expected_command="train-vae").recipe
    assert isinstance(recipe, TrainVaeRecipe)
    one = activation_bytes(recipe)
    assert memory["activations"] == 8 * one["kept"]
    held = sum(size for name, size in resident.items() if name != "save")
    assert memory["total"] == held + memory["activations"]
    assert memory["with"] == {
        "train.micro_batch=4": held + 4 * one["kept"],
        "train.gradient_checkpointing=true": held + 8 * one["checkpointed"],
        "train.precision=bf16": held + 4 * one["kept"] + 2 * result["parameters"]["vae"],
    }


DEMOS = ["demo/unet", "demo/vae", "demo/vq", "demo/clip", "demo/ar", "sd3/demo", "prior/demo", "unclip/demo"]
DEMOS += ["cascade/demo-base", "cascade/demo-large"]


@pytest.mark.parametrize("name", DEMOS)
def test_activations_are_those_that_a_real_forward_pass_saves(name: str) -> None:
    recipe = load_recipe(name).recipe
    assert isinstance(recipe, TrainRecipe)
    sizes = activation_bytes(recipe, 4)
    with torch.random.fork_rng():
        model, forward = activation_sizes._with_one_sample(recipe, 4)
        real = activation_sizes._saved_bytes(model, forward)
    assert 0.8 * real < sizes["kept"] < 1.25 * real
    assert 0 < sizes["checkpointed"] < sizes["kept"]


def test_hours_are_measured_in_a_folder_that_is_deleted(tmp_path: Path) -> None:
    write_scenes(Path("shards"), 20, 32, 0, SilentReporter(), val_samples=3)
    recipe = load_recipe(
        None,
        ["name=x", "data.shards=shards/train-*.tar", "data.image_size=32", *VAE, "train.steps=3", "train.batch_size=4"],
        expected_command="train-vae",
    ).recipe
    assert isinstance(recipe, TrainRecipe)
    found = measure(recipe, RunOptions(device="cpu"), 20, SilentReporter())
    assert found["seconds_per_step"] == pytest.approx(4 / found["images_per_second"])
    assert found["hours"] == pytest.approx(found["seconds_per_step"] * 3 / 3600)
    assert found["hours_per_epoch"] == pytest.approx(20 / found["images_per_second"] / 3600)
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_a_dry_run_prints_memory_first_and_then_what_differs_from_the_defaults(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert app.run(["train-vae", "demo/vae", "--dry-run", "train.log_every=10", "train.eps=1e-6"]) == 0
    out = capfd.readouterr().out
    assert out.startswith("memory\n total ")
    changed = parse_yaml(out[out.index("\ncommand: ") :]).data
    assert changed["train"]["eps"] == 1e-6
    assert not {"log_every", "max_nonfinite"} & changed["train"].keys()
    assert load_recipe(None, [], expected_command="train-vae", base=changed).recipe.to_mapping() == (
        load_recipe("demo/vae", ["train.eps=1e-6"]).recipe.to_mapping()
    )


def test_the_discriminator_is_trained_but_not_averaged() -> None:
    plain = planned("train-vae", *VAE, *TRAIN, "train.ema_decay=0.9")
    adversarial = planned("train-vae", *VAE, *TRAIN, "train.ema_decay=0.9", "loss.adversarial_weight=0.5")
    assert set(adversarial["parameters"]) == {"vae", "discriminator"}
    added = adversarial["parameters"]["discriminator"]
    assert adversarial["bytes"]["optimizer"] - plain["bytes"]["optimizer"] == 8 * added
    assert adversarial["bytes"]["ema"] == plain["bytes"]["ema"]


def test_what_is_missing_is_noted_not_raised(tmp_path: Path) -> None:
    result = planned("train-unet", "vae=runs/v/model", "text_encoder=runs/c/model", "unet={}", *TRAIN)
    assert set(result["parameters"]) == {"unet"}
    assert "shards" not in result
    assert "epochs" not in result
    vae, text, shards = result["notes"]
    assert "runs/v/model" in vae
    assert "runs/c/model" in text
    assert "shards/train-*.tar" in shards
    assert list(tmp_path.iterdir()) == []


UNET = (
    "unet={block_out_channels: [16, 16], down_block_types: [DownBlock2D, CrossAttnDownBlock2D],"
    " up_block_types: [CrossAttnUpBlock2D, UpBlock2D], layers_per_block: 1, norm_num_groups: 8,"
    " attention_head_dim: 2, cross_attention_dim: 16, in_channels: 4, out_channels: 4}"
)


def _save_parts() -> tuple[AutoencoderKL, CLIPModel]:
    """A tiny autoencoder in v/ and a tiny CLIP in c/."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(AutoencoderKLConfig(block_out_channels=(16, 16), norm_num_groups=8, **blocks))  # type: ignore[arg-type]
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPModel(CLIPConfig.from_mapping({"text_config": {**tower, "vocab_size": 520}, "vision_config": tower}))
    save_model(Path("v"), vae.state_dict(), vae.config.to_hugging_face())
    save_model(Path("c"), clip.state_dict(), clip.config.to_hugging_face())
    return vae, clip


def test_frozen_models_count_as_weights_only() -> None:
    vae, clip = _save_parts()
    result = planned("train-unet", "vae=v", "text_encoder=c", UNET, *TRAIN)
    recipe = load_recipe(
        None, ["name=x", "data.shards=x", "vae=v", "text_encoder=c", UNET, *TRAIN], expected_command="train-unet"
    ).recipe
    assert isinstance(recipe, TrainUnetRecipe)
    unet = count_parameters(UNet2DConditionModel(recipe.unet))
    frozen = count_parameters(vae) + count_parameters(clip.text_model)
    assert result["parameters"] == {
        "unet": unet,
        "vae": count_parameters(vae),
        "text_encoder": count_parameters(clip.text_model),
    }
    assert result["bytes"]["weights"] == 4 * (unet + frozen)
    assert result["bytes"]["gradients"] == 4 * unet


def test_parts_that_do_not_fit_together_are_refused_before_training() -> None:
    _save_parts()
    with pytest.raises(RecipeError, match="cross_attention_dim=32"):
        planned("train-unet", "vae=v", "text_encoder=c", UNET, "unet.cross_attention_dim=32", *TRAIN)


def test_evaluation_and_sampling_have_plans_too() -> None:
    vae, clip = _save_parts()
    result = planned("eval", "data.shards=x.tar", "eval={metrics: [retrieval], clip: c}")
    assert result["parameters"] == {"clip": count_parameters(clip)}
    for folder in ("c", "v"):
        Path("runs", folder).mkdir(parents=True)
        Path(folder).rename(Path("runs", folder, "model"))
    shards, metrics = "data.shards=x.tar", "metrics: [retrieval, reconstruction]"
    result = planned("eval", shards, f"eval={{{metrics}, clip: runs/c, vae: runs/v, pipeline: not/needed}}")
    assert result["parameters"] == {"clip": count_parameters(clip), "vae": count_parameters(vae)}
    assert not [note for note in result["notes"] if "eval." in note]
    assert "eval.vae" in planned("eval", shards, "eval={metrics: [reconstruction], vae: runs/x}")["notes"][0]
    swept = "sweep: {steps: [1, 2, 3]}, num_generated: 10, pipelines: {a: runs/x, b: runs/y}"
    result = planned("eval", shards, f"eval={{metrics: [fid], inception: weights, {swept}}}")
    assert result["parameters"] == {"inception": 21_785_568 + 1008 * 2049}  # torchvision's trunk, and 1008 classes
    assert result["images"] == 60
    assert [note.partition(":")[0] for note in result["notes"][:3]] == [
        "eval.pipelines.a",
        "eval.pipelines.b",
        "eval.inception",
    ]
    result = planned("sample", "model=nowhere", "prompts=[a, b]", "sampling.images_per_prompt=3")
    assert result["images"] == 6
    assert result["parameters"] == {}
    assert "nowhere" in result["notes"][0]


def test_a_model_larger_than_memory_is_planned_without_allocating() -> None:
    result = planned("train-vae", *VAE, "vae.block_out_channels=[8192, 8192]", *TRAIN)
    assert result["parameters"]["vae"] > 10**10


def test_sharded_ranks_are_planned_with_a_part_each() -> None:
    changes = [*VAE, *TRAIN, "train.ema_decay=0.9", "loss.adversarial_weight=0.5", "loss.adversarial_adaptive=false"]
    loaded = load_recipe(None, ["name=x", "data.shards=x", *changes], expected_command="train-vae")
    sharded = load_recipe(
        None, ["name=x", "data.shards=x", "train.strategy=sharded", *changes], expected_command="train-vae"
    )
    whole, one, each = (
        dry_run(recipe.recipe, SilentReporter(), ranks) for recipe, ranks in ((loaded, 4), (sharded, 1), (sharded, 4))
    )
    vae, discriminator = whole["parameters"]["vae"], whole["parameters"]["discriminator"]
    assert whole["bytes"] == one["bytes"]
    assert each["bytes"]["optimizer"] == 8 * (-(-vae // 4) + discriminator), "the discriminator stays whole"
    assert each["bytes"]["ema"] == 4 * -(-vae // 4)
    assert "each of 4 ranks" in each["notes"][0]
    with pytest.raises(RecipeError, match="among 3 ranks"):
        dry_run(sharded.recipe, SilentReporter(), 3)
