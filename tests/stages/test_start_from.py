"""Training that begins at trained weights, whole or with frozen parts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ldm_cli.core.clip_loss import contrastive_loss
from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.clip import CLIPModel
from ldm_cli.core.pixels import to_bytes, to_signed
from ldm_cli.data.loader import sequential_batches
from ldm_cli.data.open_shards import open_shards
from ldm_cli.errors import CheckpointError, InputNotFoundError, RecipeError
from ldm_cli.evaluation.clip_features import CLIPFeatures
from ldm_cli.evaluation.image_quality import psnr
from ldm_cli.formats.model_folder import load_model
from ldm_cli.formats.model_source import load_tensors
from ldm_cli.recipe.schema import TrainClipRecipe, TrainUnetRecipe, TrainVaeRecipe
from ldm_cli.reporting import SilentReporter
from ldm_cli.stages.dry_run import dry_run
from ldm_cli.stages.support.start import freeze, frozen_names, resolve_start
from ldm_cli.training import saving
from tests.faults.runs import metrics

from .conftest import LONG
from .tiny import RESNET, assert_resumes, clip_recipe, lose_after, trained, unet_recipe, vae_recipe

DECODER_ONLY = ["encoder.*", "quant_conv.*"]
# A folder that a test changes on purpose has no list of its files.
UNLISTED = shutil.ignore_patterns("manifest.json")


def started(recipe: Mapping[str, Any], section: str, source: Path, **fields: Any) -> dict[str, Any]:
    """The recipe without its model's section, beginning at `source`."""
    return {name: value for name, value in recipe.items() if name != section} | {"start_from": str(source), **fields}


def decoder_recipe(scenes: Path, source: Path, **train: Any) -> dict[str, Any]:
    return started(vae_recipe(scenes, **train), "vae", source, freeze=DECODER_ONLY)


def changed(source: Path, model: Path) -> set[str]:
    """Names of the tensors that differ."""
    before, after = load_tensors(source), load_tensors(model)
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_a_decoder_alone_is_tuned_and_its_encoder_keeps_every_bit(scenes: Path, vae_run: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(vae_run / "model", source, ignore=UNLISTED)
    theirs = json.loads((source / "config.json").read_text()) | {"scaling_factor": 0.75, "shift_factor": 0.25}
    (source / "config.json").write_text(json.dumps(theirs))
    result = trained(decoder_recipe(scenes, source, steps=6, lr=1e-2, ema_decay=0.5), tmp_path / "run")
    moved = changed(source, tmp_path / "run/model")
    assert {name.partition(".")[0] for name in moved} == {"decoder", "post_quant_conv"}
    ours = json.loads((tmp_path / "run/model/config.json").read_text())
    for name in ("scaling_factor", "shift_factor"):
        assert ours[name] == result["figures"][name] == theirs[name], name


def test_frozen_parameters_are_written_once_and_diffusers_opens_every_folder(
    scenes: Path, vae_run: Path, tmp_path: Path
) -> None:
    diffusers = pytest.importorskip("diffusers")
    trained(decoder_recipe(scenes, vae_run, steps=4, save_every=2, ema_decay=0.5), tmp_path)
    first = "diffusion_pytorch_model-00001-of-00002.safetensors"
    shards = [tmp_path / "frozen" / first, tmp_path / "model" / first]
    shards += sorted(tmp_path.glob(f"checkpoints/*/*/{first}"))
    assert len(shards) == 6
    assert len({shard.stat().st_ino for shard in shards}) == 1, "hard links to one file"
    for shard in shards[1:]:
        their = diffusers.AutoencoderKL.from_pretrained(shard.parent).state_dict()
        ours = load_tensors(shard.parent)
        assert their.keys() == ours.keys()
        assert all(torch.equal(their[name], ours[name]) for name in ours)
    state = load_file(tmp_path / "checkpoints/step-00000004/training.safetensors")
    assert not [name for name in state if "encoder" in name or ".quant_conv" in name], "frozen parts have no moments"


def test_the_room_a_checkpoint_takes_is_known_before_it_is_written(
    scenes: Path, vae_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(saving, "_HEADER_BYTES", 0)
    monkeypatch.setattr(saving, "expect_room", lambda folder, num_bytes, what: sizes.append(num_bytes))
    trained(decoder_recipe(scenes, vae_run, steps=1, ema_decay=0.5), tmp_path)
    files = (tmp_path / "checkpoints/step-00000001").rglob("*.safetensors")
    own = [file for file in files if file.stat().st_nlink == 1]
    assert sizes[-1] == pytest.approx(sum(value.nbytes for file in own for value in load_file(file).values()), rel=0.02)


def test_the_first_validation_is_that_of_the_source(scenes: Path, vae_run: Path, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    trained(decoder_recipe(scenes, vae_run, steps=1, validation_samples=8), tmp_path)
    their = diffusers.AutoencoderKL.from_pretrained(vae_run / "model").eval()
    recipe = TrainVaeRecipe.from_mapping(vae_recipe(scenes))
    assert recipe.data.val_shards is not None
    shards = open_shards(recipe.data.val_shards, recipe.data, SilentReporter())
    (batch,) = sequential_batches(shards, recipe.data, 8, limit=8, with_captions=False)
    with torch.no_grad():
        images = their.decode(their.encode(to_signed(batch.images, torch.device("cpu"))).latent_dist.mode()).sample
    first = metrics(tmp_path)[0]
    assert first["step"] == 0
    assert first["val_psnr"] == pytest.approx(psnr(to_bytes(images), batch.images).mean().item(), abs=1e-3)


@pytest.mark.parametrize(
    ("vision", "locked"),
    [(None, ["vision_model.*", "visual_projection.*"]), (RESNET, ["vision_model.*"])],
    ids=["vit", "rn"],
)
def test_a_clip_with_its_image_tower_locked_that_is_killed_ends_the_same(
    scenes: Path, clip_run: Path, tmp_path: Path, vision: dict[str, Any] | None, locked: list[str]
) -> None:
    source = clip_run
    if vision is not None:
        source = tmp_path / "source"
        trained(clip_recipe(scenes, vision, steps=2), source)
    train = {"steps": 5, "save_every": 2, "ema_decay": 0.5, "micro_batch": 4, "optimizer": "muon"}
    recipe = started(clip_recipe(scenes, **train), "clip", source, freeze=locked)
    del recipe["tokenizer"]
    assert_resumes(recipe, tmp_path, 2)
    moved = changed(source / "model", tmp_path / "whole/model")
    prefixes = tuple(pattern.removesuffix("*") for pattern in locked)
    assert any(name.startswith("text_model.") for name in moved)
    assert not [name for name in moved if name.startswith(prefixes)], "running statistics stay, too"
    if vision is None:
        transformers = pytest.importorskip("transformers")
        their = transformers.CLIPModel.from_pretrained(tmp_path / "whole/checkpoints/step-00000004/ema").state_dict()
        ours = load_tensors(tmp_path / "whole/checkpoints/step-00000004/ema")
        assert all(torch.equal(their[name], ours[name]) for name in ours)


def test_a_continued_denoiser_begins_with_the_validation_its_source_ended_with(
    scenes: Path, clip_run: Path, vae_run: Path, unet_run: Path, tmp_path: Path
) -> None:
    train = {"steps": 2, "validation_samples": LONG["validation_samples"]}
    recipe = started(unet_recipe(scenes, clip_run / "model", vae_run / "model", **train), "unet", unet_run)
    trained(recipe, tmp_path)
    ended, begun = metrics(unet_run)[-1], metrics(tmp_path)[0]
    assert begun == {"step": 0} | {
        name.removesuffix("_ema"): value
        for name, value in ended.items()
        if name.startswith("val_") and name.endswith("_ema")
    }


def test_a_folder_of_diffusers_is_continued_with_its_own_parts_and_process(scenes: Path, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from diffusers import StableDiffusionPipeline

    from tests.parity.their_pipeline import scheduler, their_folder

    folder = their_folder(tmp_path, scheduler("ddim", prediction_type="v_prediction", num_train_timesteps=500))
    base = unet_recipe(scenes, Path(), Path(), {"caption_dropout": 0.2}, steps=3, lr=1e-2)
    recipe = started(base, "unet", folder, vae="", text_encoder="", freeze=["*", "!*.attn2.*"])
    trained(recipe, tmp_path / "run")
    resolved = json.loads((tmp_path / "run/recipe.resolved.yaml").read_text())["recipe"]
    assert resolved["unet"]["cross_attention_dim"] == 24
    assert resolved["diffusion"]["prediction_type"] == "v_prediction"
    assert resolved["diffusion"]["num_train_timesteps"] == 500
    assert resolved["diffusion"]["caption_dropout"] == 0.2
    moved = changed(folder / "unet", tmp_path / "run/model/unet")
    assert moved
    assert all(".attn2." in name for name in moved)
    for written in (tmp_path / "run/model", tmp_path / "run/checkpoints/step-00000003/model"):
        their = StableDiffusionPipeline.from_pretrained(written, safety_checker=None)
        ours = load_tensors(written / "unet")
        assert all(torch.equal(tensor, ours[name]) for name, tensor in their.unet.state_dict().items())


def test_a_pipeline_without_the_part_to_train_is_named(scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
    recipe = unet_recipe(scenes, tmp_path, tmp_path) | {"start_from": str(tmp_path), "unet": None}
    with pytest.raises(CheckpointError, match=r"no unet in .*it holds a StableDiffusion3Pipeline"):
        resolve_start(TrainUnetRecipe.from_mapping(recipe), pytest.fail)


def test_a_given_field_of_the_process_wins_with_a_warning(scenes: Path, unet_run: Path) -> None:
    base = unet_recipe(scenes, Path(), Path(), {"prediction_type": "v_prediction"})
    recipe = TrainUnetRecipe.from_mapping(started(base, "unet", unet_run, vae="", text_encoder=""))
    warnings: list[str] = []
    filled = resolve_start(recipe, warnings.append)
    assert filled.diffusion.prediction_type == "v_prediction"
    assert filled.vae == str(unet_run / "model/vae")
    assert len(warnings) == 1
    assert warnings[0].startswith("diffusion.prediction_type='v_prediction', but the scheduler of '")


def test_the_dry_run_refuses_weights_that_do_not_fit_their_configuration(
    scenes: Path, vae_run: Path, clip_run: Path, tmp_path: Path
) -> None:
    def misfit(source: Path, field: str, value: Any) -> Path:
        folder = Path(shutil.copytree(source, tmp_path / field, ignore=UNLISTED))
        config = json.loads((folder / "config.json").read_text()) | {field: value}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    clip, vae = misfit(clip_run / "model", "projection_dim", 5), misfit(vae_run / "model", "block_out_channels", [4, 8])
    for recipe in (
        TrainVaeRecipe.from_mapping(started(vae_recipe(scenes), "vae", vae)),
        TrainVaeRecipe.from_mapping(vae_recipe(scenes, loss={"perceptual_clip": str(clip)})),
        TrainUnetRecipe.from_mapping(unet_recipe(scenes, clip_run / "model", vae)),
    ):
        with pytest.raises(CheckpointError, match="do not fit"):
            dry_run(recipe, SilentReporter())


def test_the_dry_run_counts_frozen_parameters_without_moments(scenes: Path, vae_run: Path) -> None:
    recipe = TrainVaeRecipe.from_mapping(decoder_recipe(scenes, vae_run, ema_decay=0.9))
    found = dry_run(recipe, SilentReporter())
    model = AutoencoderKL(resolve_start(recipe, print).model)
    parts = {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}
    tuned, kept = parts["decoder"] + parts["post_quant_conv"], parts["encoder"] + parts["quant_conv"]
    assert found["parameters"] == {"vae": tuned, "vae.frozen": kept}
    assert found["bytes"] == {
        "weights": 4 * (tuned + kept), "gradients": 4 * tuned, "optimizer": 8 * tuned, "ema": 4 * tuned,
        "save": 8 * (tuned + kept) + 8 * tuned,
    }  # fmt: skip


def test_patterns_apply_in_their_order() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(1, 1), "b": torch.nn.Linear(1, 1)})
    freeze(model, ["*", "!a.*", "a.bias"])
    assert frozen_names(model) == {"a.bias", "b.weight", "b.bias"}


def test_a_clip_without_a_tokenizer_takes_the_one_that_is_named_if_it_fits(
    scenes: Path, clip_run: Path, tmp_path: Path
) -> None:
    bare, named = tmp_path / "bare", tmp_path / "named"
    named.mkdir()
    shutil.copytree(clip_run / "model", bare, ignore=UNLISTED)
    for file in [path for path in bare.iterdir() if path.suffix in (".json", ".txt")]:
        if file.name not in ("config.json", "preprocessor_config.json"):
            file.rename(named / file.name)
    recipe = started(clip_recipe(scenes), "clip", bare)
    del recipe["tokenizer"]
    with pytest.raises(InputNotFoundError, match=r"name the tokenizer's folder in tokenizer\.path"):
        resolve_start(TrainClipRecipe.from_mapping(recipe), print)
    recipe["tokenizer"] = {"path": str(named)}
    assert resolve_start(TrainClipRecipe.from_mapping(recipe), print).tokenizer.path == str(named)
    config = json.loads((bare / "config.json").read_text())
    config["text_config"]["eos_token_id"] -= 1
    (bare / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match="does not fit"):
        resolve_start(TrainClipRecipe.from_mapping(recipe), print)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            ["encoder.*", "decodre.*", "x"],
            r"no parameter matches 'decodre\.\*', 'x': there are encoder\.\*, decoder\.\*",
        ),
        (["*"], "leaves nothing to train"),
        (["!decoder.*"], "leaves nothing frozen"),
        (["encoder.*", "!*"], "leaves nothing frozen"),
        (["!*", "*"], "leaves nothing to train"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(
    scenes: Path, vae_run: Path, tmp_path: Path, patterns: list[str], message: str
) -> None:
    recipe = decoder_recipe(scenes, vae_run) | {"freeze": patterns}
    with pytest.raises(RecipeError, match=message):
        trained(recipe, tmp_path)


def test_a_recipe_that_contradicts_the_folder_is_refused_field_by_field(
    scenes: Path, vae_run: Path, tmp_path: Path
) -> None:
    recipe = vae_recipe(scenes, vae={"latent_channels": 4, "norm_num_groups": 2}) | {"start_from": str(vae_run)}
    with pytest.raises(RecipeError, match=r"latent_channels=4, but .* has 3; vae\.norm_num_groups=2, .* has 4"):
        trained(recipe, tmp_path)


def test_tensors_that_do_not_fit_are_named(scenes: Path, vae_run: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text((vae_run / "model/config.json").read_text())
    tensors = load_tensors(vae_run / "model")
    del tensors["decoder.conv_in.bias"]
    tensors |= {"more": torch.zeros(1), "quant_conv.bias": torch.zeros(5)}
    save_file(tensors, source / "diffusion_pytorch_model.safetensors")
    message = (
        r"missing: decoder\.conv_in\.bias; unexpected: more; of another shape: quant_conv\.bias is \[5\], not \[6\]"
    )
    with pytest.raises(CheckpointError, match=message) as caught:
        trained(started(vae_recipe(scenes), "vae", source), tmp_path / "run")
    assert caught.value.code == 83


def test_another_source_under_the_same_path_is_another_run(scenes: Path, vae_run: Path, tmp_path: Path) -> None:
    for seed, name in ((0, "one"), (1, "two")):
        trained(vae_recipe(scenes, steps=1) | {"seed": seed}, tmp_path / name)
    source, recipe = tmp_path / "source", started(vae_recipe(scenes, steps=2), "vae", tmp_path / "source")
    source.symlink_to(tmp_path / "one/model")
    lose_after(2, recipe, tmp_path / "run")
    source.unlink()
    source.symlink_to(tmp_path / "two/model")
    with pytest.raises(CheckpointError, match="the fingerprint of start_from"):
        trained(recipe, tmp_path / "run")
    assert trained(recipe | {"start_from": str(tmp_path / "one")}, tmp_path / "run")["step"] == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "vae: missing, and there is no start_from"),
        ({"freeze": ["encoder.*"], "vae": {}}, "freeze needs start_from"),
    ],
)
def test_a_recipe_without_a_model_or_with_nothing_to_keep_is_refused(
    scenes: Path, fields: dict[str, Any], message: str
) -> None:
    recipe = {name: value for name, value in vae_recipe(scenes).items() if name != "vae"} | fields
    with pytest.raises(ValueError, match=message):
        TrainVaeRecipe.from_mapping(recipe)


def test_a_missing_folder_is_named(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match=r"start_from: no folder '/nowhere'"):
        trained(started(vae_recipe(scenes), "vae", Path("/nowhere")), tmp_path)


def test_an_adaptive_weight_needs_the_last_layer(scenes: Path, vae_run: Path, tmp_path: Path) -> None:
    loss = {"adversarial_weight": 0.5, "discriminator_layers": 1, "discriminator_channels": 8}
    recipe = started(vae_recipe(scenes, loss=loss, steps=1), "vae", vae_run, freeze=["decoder.conv_out.*"])
    with pytest.raises(RecipeError, match="adversarial_adaptive"):
        dry_run(TrainVaeRecipe.from_mapping(recipe), SilentReporter())
    with pytest.raises(RecipeError, match="adversarial_adaptive"):
        trained(recipe, tmp_path / "run")
    trained(recipe | {"loss": {**loss, "adversarial_adaptive": False}}, tmp_path / "run")


def test_a_clip_that_is_continued_keeps_the_image_processor_of_its_source(
    scenes: Path, clip_run: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(clip_run / "model", tmp_path / "source", ignore=UNLISTED))
    file = source / "preprocessor_config.json"
    ours = json.loads(file.read_text())
    # Transformers 5 writes it there.
    nested = {"image_processor": ours | {"image_mean": [0.5] * 3, "image_std": [0.25, 0.5, 0.5]}}
    (source / "processor_config.json").write_text(json.dumps(nested))
    recipe = started(clip_recipe(scenes, steps=1, validation_samples=8), "clip", source)
    trained(recipe, tmp_path / "run")
    assert json.loads((tmp_path / "run/model/preprocessor_config.json").read_text()) == nested["image_processor"]
    features, data = CLIPFeatures.load(source, torch.device("cpu")), TrainClipRecipe.from_mapping(recipe).data
    assert data.val_shards is not None
    (batch,) = sequential_batches(open_shards(data.val_shards, data, SilentReporter()), data, 8, limit=8)
    scale = load_model(CLIPModel, source).clamped_logit_scale
    loss, _ = contrastive_loss(features.images(batch.images), features.texts(batch.captions), scale)
    assert metrics(tmp_path / "run")[0]["val_loss"] == pytest.approx(loss.item(), abs=1e-5)
    file.unlink()
    (source / "processor_config.json").unlink()
    with pytest.raises(CheckpointError, match="the fingerprint of the image processor"):
        trained(recipe, tmp_path / "run")


def test_a_trained_encoder_behind_a_frozen_latent_is_measured_not_folded(
    scenes: Path, vae_run: Path, tmp_path: Path
) -> None:
    kept = ["decoder.*", "post_quant_conv.*", "quant_conv.*"]
    result = trained(started(vae_recipe(scenes, steps=2, lr=1e-2), "vae", vae_run, freeze=kept), tmp_path)
    assert {name.partition(".")[0] for name in changed(vae_run / "model", tmp_path / "model")} == {"encoder"}
    assert result["figures"]["shift_factor"] != 0
