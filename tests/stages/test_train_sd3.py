"""`train-unet` of Stable Diffusion 3: a transformer, three text encoders, its folder, its cache, its resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_cli.core.condition import Condition
from ldm_cli.data.loader import Loader
from ldm_cli.errors import CheckpointError, RecipeError
from ldm_cli.families.adapted import adaptable_models, adaptable_networks
from ldm_cli.families.lora_reader import read_lora
from ldm_cli.families.open_family import open_family
from ldm_cli.families.stable_diffusion_3 import StableDiffusion3
from ldm_cli.recipe.schema import TrainUnetRecipe
from ldm_cli.reporting import SilentReporter
from ldm_cli.stages.dry_run import dry_run
from ldm_cli.stages.support.activation_sizes import activation_bytes
from ldm_cli.stages.support.batch_encoder import cache_key
from ldm_cli.stages.support.options import RunOptions, with_precision
from ldm_cli.stages.support.start import resolve_start
from ldm_cli.stages.train_unet import DenoiserTask
from ldm_cli.training.running_statistics import RunningStatistics

from .test_precompute import assert_a_cache_changes_nothing
from .tiny import assert_resumes, losses, trained, unet_recipe, workbench
from .tiny_sd3 import save_tiny_sd3, sd3_recipe, tiny_sd3
from .tiny_xl import save_tiny_xl


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An autoencoder, two CLIP towers and T5, untrained."""
    return save_tiny_sd3(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def without_t5(parts: dict[str, str]) -> dict[str, str]:
    """The same without T5."""
    return {name: folder for name, folder in parts.items() if name != "text_encoder_3"}


def test_a_run_writes_a_folder_that_we_and_diffusers_open(scenes: Path, parts: dict[str, str], tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    trained(sd3_recipe(scenes, parts, {"flow_shift": 3.0}, steps=3, ema_decay=0.9), tmp_path)
    family = open_family(tmp_path)
    assert isinstance(family, StableDiffusion3)
    assert (tmp_path / "samples/step-00000003/grid.png").is_file()
    assert family.encoder.t5_length == 9
    theirs = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path / "model")
    assert theirs.scheduler.config.shift == 3.0
    ours = family.denoiser.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.transformer.state_dict().items())
    for key in ("transformer", "text_encoder_2", "text_encoder_3"):
        assert getattr(theirs, key) is not None


@pytest.mark.parametrize("has_t5", [False, True])
def test_a_trained_folder_gives_the_conditions_of_diffusers_at_its_length_of_t5(
    scenes: Path, parts: dict[str, str], without_t5: dict[str, str], tmp_path: Path, has_t5: bool
) -> None:
    diffusers = pytest.importorskip("diffusers")
    trained(sd3_recipe(scenes, parts if has_t5 else without_t5, steps=1), tmp_path)
    family, caption = open_family(tmp_path), "a red circle"
    assert isinstance(family, StableDiffusion3)
    assert family.encoder.t5_length == (9 if has_t5 else 0)
    ours = family.encoder.encode_tokens(family.encoder.tokens([caption]))
    absent = {} if has_t5 else {"text_encoder_3": None, "tokenizer_3": None}
    theirs = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path / "model", **absent)
    tokens, _, pooled, _ = theirs.encode_prompt(caption, None, None, max_sequence_length=9 if has_t5 else 0)
    torch.testing.assert_close(ours.tokens, tokens, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.pooled, pooled, atol=1e-5, rtol=0)


@pytest.mark.parametrize("has_t5", [False, True])
def test_training_from_a_cache_gives_the_same_weights_and_losses(
    scenes: Path, parts: dict[str, str], without_t5: dict[str, str], tmp_path: Path, has_t5: bool
) -> None:
    recipe = sd3_recipe(
        scenes, parts if has_t5 else without_t5, {"encoder_dropout": 0.3}, steps=2, log_every=1, save_every=2
    )
    assert_a_cache_changes_nothing(recipe, tmp_path)


def test_a_lost_run_ends_in_the_same_weights(scenes: Path, parts: dict[str, str], tmp_path: Path) -> None:
    recipe = sd3_recipe(scenes, parts, {"encoder_dropout": 0.464}, steps=4, save_every=2, ema_decay=0.9)
    assert_resumes(recipe, tmp_path, 2)


def test_a_run_begins_at_a_folder_and_trains_what_is_not_frozen(
    scenes: Path, parts: dict[str, str], tmp_path: Path
) -> None:
    folder = str(Path(parts["vae"]).parent)
    recipe = sd3_recipe(scenes, {}, steps=3)
    recipe = {name: value for name, value in recipe.items() if name not in ("vae", "text_encoder", "transformer")}
    recipe |= {"start_from": folder, "freeze": ["*", "!proj_out.*"], "diffusion": {}}
    recipe["data"]["image_size"] = 16
    filled = resolve_start(TrainUnetRecipe.from_mapping(recipe), pytest.fail)
    assert filled.component == "transformer"
    assert filled.text_encoder_3 == parts["text_encoder_3"]
    assert filled.max_sequence_length == 9
    assert (filled.diffusion.prediction_type, filled.diffusion.flow_shift) == ("flow_prediction", 3.0)
    trained(recipe, tmp_path)
    family = open_family(tmp_path)
    assert family.sample_size == (12, 12), "the size that the positions of the patches belong to"
    before, after = tiny_sd3().denoiser.state_dict(), family.denoiser.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"proj_out.weight", "proj_out.bias"}


def test_adapters_of_the_transformer_are_trained_resumed_and_read_by_diffusers(
    scenes: Path, parts: dict[str, str], tmp_path: Path
) -> None:
    diffusers = pytest.importorskip("diffusers")
    recipe = sd3_recipe(scenes, {}, steps=4, save_every=2, lr=1e-2)
    recipe = {name: value for name, value in recipe.items() if name not in ("vae", "text_encoder", "transformer")}
    recipe |= {"start_from": str(Path(parts["vae"]).parent), "diffusion": {}, "lora": {"rank": 2, "targets": ["all"]}}
    assert_resumes(recipe, tmp_path, 2)
    family = open_family(Path(parts["vae"]).parent)
    models = adaptable_models(adaptable_networks(family))
    folder = tmp_path / "whole/model"
    ours, kohyas = (read_lora(file, models) for file in (folder, folder / "tiny.safetensors"))
    theirs = diffusers.StableDiffusion3Pipeline.from_pretrained(Path(parts["vae"]).parent)
    before = {name: tensor.clone() for name, tensor in theirs.transformer.state_dict().items()}
    theirs.load_lora_weights(folder)
    theirs.fuse_lora(components=["transformer"])
    after = {name.replace(".base_layer", ""): tensor for name, tensor in theirs.transformer.state_dict().items()}
    assert set(ours["transformer"]) == set(kohyas["transformer"])
    # Nothing attends with the queries of the last text tokens.
    untrained = {module for module, update in ours["transformer"].items() if not update.delta().any()}
    assert untrained == {"transformer_blocks.1.attn.add_q_proj"}
    for module, update in ours["transformer"].items():
        torch.testing.assert_close(kohyas["transformer"][module].delta(), update.delta())
        torch.testing.assert_close(
            after[f"{module}.weight"] - before[f"{module}.weight"], update.delta(), atol=1e-5, rtol=0
        )


def make_task(recipe: dict[str, Any], path: Path) -> tuple[DenoiserTask, Loader]:
    config = with_precision(TrainUnetRecipe.from_mapping(recipe), RunOptions(device="cpu"))
    bench = workbench(config, path)
    return DenoiserTask(config, bench), Loader(bench.shards, config.data, seed=0, batch_size=32)


def conditions_seen(recipe: dict[str, Any], path: Path) -> tuple[Condition, Condition, Condition]:
    """Of a batch of 32: what the transformer is given, what the encoders gave, and the empty condition."""
    task, loader = make_task(recipe, path)
    batch = task.prepare(next(iter(loader.batches(0, 1))))
    seen: list[Condition] = []

    def watched(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        seen.append(condition)
        return torch.zeros_like(x)

    object.__setattr__(task.family, "denoiser", watched)
    task.loss(batch, 0)
    return seen[0], task.encoder(batch)[1], task.denoising.empty


def parts_of(condition: Condition, row: int, width: int = 8, projection: int = 10) -> list[list[Tensor]]:
    """What each of three encoders gave for a sample."""
    assert condition.tokens is not None
    assert condition.pooled is not None
    tokens, pooled = condition.tokens[row], condition.pooled[row]
    return [[tokens[:12, :width], pooled[:projection]], [tokens[:12, width:], pooled[projection:]], [tokens[12:]]]


def test_encoders_are_left_out_by_themselves_and_all_of_them_make_the_empty_caption(
    scenes: Path, parts: dict[str, str], tmp_path: Path
) -> None:
    recipe = sd3_recipe(scenes, parts, {"encoder_dropout": 0.464, "caption_dropout": 0.0}, batch_size=32)
    given, whole, empty = conditions_seen(recipe, tmp_path)
    kinds = []
    for row in range(32):
        pieces = [parts_of(condition, row if len(condition.tokens) > 1 else 0) for condition in (given, whole, empty)]  # type: ignore[arg-type]
        if all(
            torch.equal(one, other)
            for ours, theirs in zip(pieces[0], pieces[2], strict=True)
            for one, other in zip(ours, theirs, strict=True)
        ):
            kinds.append("empty")
            continue
        kind = ""
        for ours, theirs in zip(pieces[0], pieces[1], strict=True):
            is_zero = not any(bool(tensor.any()) for tensor in ours)
            assert is_zero or all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
            kind += "-" if is_zero else "+"
        kinds.append(kind)
    assert "---" not in kinds
    assert set(kinds) >= {"empty", "+++", "-++", "+-+", "++-"}


def test_without_dropout_of_encoders_conditions_are_as_they_are(
    scenes: Path, parts: dict[str, str], tmp_path: Path
) -> None:
    given, whole, _ = conditions_seen(sd3_recipe(scenes, parts, {"caption_dropout": 0.0}, batch_size=32), tmp_path)
    assert torch.equal(given.tokens, whole.tokens)  # type: ignore[arg-type]
    assert torch.equal(given.pooled, whole.pooled)  # type: ignore[arg-type]


@pytest.mark.parametrize(("dropout", "share"), [(0.0, "9.99"), (0.1, "19")])
def test_the_dry_run_says_how_many_captions_become_empty(
    scenes: Path, parts: dict[str, str], dropout: float, share: str
) -> None:
    recipe = sd3_recipe(scenes, parts, {"encoder_dropout": 0.464, "caption_dropout": dropout})
    result = dry_run(TrainUnetRecipe.from_mapping(recipe), SilentReporter())
    assert f"{share} % of captions become the empty one" in " ".join(result["notes"])
    assert result["parameters"].keys() == {"transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"}


def test_activations_grow_with_the_tokens_of_t5(scenes: Path, parts: dict[str, str]) -> None:
    def kept(length: int | None) -> int:
        recipe = TrainUnetRecipe.from_mapping(sd3_recipe(scenes, parts) | {"max_sequence_length": length})
        return activation_bytes(recipe, 2)["kept"]

    assert kept(None) == kept(256) > kept(9)


@pytest.mark.parametrize(
    ("transformer", "fields", "message"),
    [
        ({"joint_attention_dim": 20}, {}, "transformer.joint_attention_dim=20, the towers' width is 24; .*T5's width"),
        ({"joint_attention_dim": 20}, {"text_encoder_3": ""}, "joint_attention_dim=20, the towers' width is 24"),
        ({"pooled_projection_dim": 12}, {}, "transformer.pooled_projection_dim=12, the towers project to 22"),
        ({"in_channels": 9}, {}, "transformer.in_channels=9 .* have 4 channels"),
        ({"pos_embed_max_size": 5}, {}, "5 patches of 4 pixels, but images have sides of 24 pixels"),
        ({}, {"diffusion": {}}, "prediction_type=epsilon, expected flow_prediction"),
        ({"patch_size": 5}, {}, "data.image_size=24 is no multiple of 10"),
        ({}, {"clip_skip": 3}, "clip_skip=3, but a text encoder has 2 layers"),
    ],
)
def test_parts_that_do_not_fit_are_named_in_the_dry_run(
    scenes: Path, parts: dict[str, str], transformer: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    recipe = sd3_recipe(scenes, parts) | fields
    recipe["transformer"] = recipe["transformer"] | transformer
    with pytest.raises(RecipeError, match=message):
        dry_run(TrainUnetRecipe.from_mapping(recipe), SilentReporter())


def test_encoders_of_a_unet_are_not_left_out_one_by_one(scenes: Path, parts: dict[str, str]) -> None:
    recipe = unet_recipe(scenes, Path(parts["text_encoder"]), Path(parts["vae"]), {"encoder_dropout": 0.5})
    with pytest.raises(RecipeError, match=r"encoder_dropout is for a transformer, or T5 beside a CLIP"):
        dry_run(TrainUnetRecipe.from_mapping(recipe), SilentReporter())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"unet": {}}, "unet and transformer: one of them is trained"),
        ({"text_encoder_2": ""}, "text_encoder_2: missing"),
        ({"transformer": None}, "unet: missing"),
        (
            {"transformer": None, "unet": {}},
            "text_encoder_2, a CLIP, or text_encoder_3, T5, beside text_encoder; not both",
        ),
        ({"max_sequence_length": 0}, "max_sequence_length=0 leaves no room for text_encoder_3"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(
    scenes: Path, parts: dict[str, str], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TrainUnetRecipe.from_mapping(sd3_recipe(scenes, parts) | fields)


def test_a_transformer_does_not_begin_at_a_unet(scenes: Path, parts: dict[str, str], tmp_path: Path) -> None:
    save_tiny_xl(tmp_path / "xl")
    recipe = sd3_recipe(scenes, parts) | {"start_from": str(tmp_path / "xl")}
    with pytest.raises(RecipeError, match="is a UNet2DConditionModel"):
        resolve_start(TrainUnetRecipe.from_mapping(recipe), pytest.fail)


@pytest.mark.parametrize("value", [-1, 513, "many"])
def test_a_length_of_t5_that_is_none_is_refused(tmp_path: Path, value: Any) -> None:
    save_tiny_sd3(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"max_sequence_length": value}))
    with pytest.raises(CheckpointError, match=r"max_sequence_length=.* is no length"):
        open_family(tmp_path)


def test_parts_of_a_batch_and_recomputed_activations_give_the_same_loss(
    scenes: Path, parts: dict[str, str], tmp_path: Path
) -> None:
    for name, train in (("whole", {}), ("parts", {"micro_batch": 4, "gradient_checkpointing": True})):
        trained(sd3_recipe(scenes, parts, steps=3, log_every=1, **train), tmp_path / name)
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def test_a_cache_of_other_encoders_is_refused(scenes: Path, parts: dict[str, str]) -> None:
    def key(**fields: Any) -> dict[str, Any]:
        recipe = sd3_recipe(scenes, parts) | fields
        return cache_key(with_precision(TrainUnetRecipe.from_mapping(recipe), RunOptions(device="cpu"))).text

    whole = key()
    assert whole.keys() >= {"text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer_3", "max_sequence_length"}
    assert key(max_sequence_length=10) != whole
    assert key(text_encoder_3="") != whole
    assert key(text_encoder=parts["text_encoder_2"]) != whole


@pytest.mark.parametrize("has_t5", [False, True])
def test_a_run_begins_at_a_folder_of_diffusers_and_ends_in_one(scenes: Path, tmp_path: Path, has_t5: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    from tests.parity.sd3_pipeline import their_sd3_folder

    theirs = their_sd3_folder(tmp_path, has_t5=has_t5)
    recipe = sd3_recipe(scenes, {}, steps=3, batch_size=4)
    recipe = {name: value for name, value in recipe.items() if name not in ("vae", "text_encoder", "transformer")}
    recipe |= {"start_from": str(theirs), "diffusion": {}, "data": recipe["data"] | {"image_size": 16}}
    trained(recipe, tmp_path / "run")
    absent = {} if has_t5 else {"text_encoder_3": None, "tokenizer_3": None}
    before, after = (
        diffusers.StableDiffusion3Pipeline.from_pretrained(folder, **absent)
        for folder in (theirs, tmp_path / "run/model")
    )
    assert after.scheduler.config.shift == before.scheduler.config.shift
    changed = [
        not torch.equal(one, other)
        for one, other in zip(before.transformer.parameters(), after.transformer.parameters(), strict=True)
    ]
    assert sum(changed) > len(changed) // 2
    for name in ("text_encoder", "text_encoder_2", "vae"):
        ours = getattr(after, name).state_dict()
        assert all(torch.equal(value, ours[key]) for key, value in getattr(before, name).state_dict().items())


def test_a_step_does_not_copy_the_positions_of_patches() -> None:
    """They are a buffer, but no running statistics."""
    statistics = RunningStatistics([tiny_sd3().denoiser])
    statistics.begin_step()
    assert statistics.take_change() == []


def test_adapters_are_counted_for_transformer_and_towers_but_not_for_t5(scenes: Path, parts: dict[str, str]) -> None:
    recipe = sd3_recipe(scenes, parts) | {"start_from": str(Path(parts["vae"]).parent)}
    recipe |= {"lora": {"rank": 2, "text_encoder": True}}
    trained_parts = dry_run(TrainUnetRecipe.from_mapping(recipe), SilentReporter())["parameters"]
    adapted = {name for name in trained_parts if name.endswith(".lora")}
    assert adapted == {"transformer.lora", "text_encoder.lora", "text_encoder_2.lora"}
