"""`train-unet` of Stable Diffusion 3: a transformer, three text encoders, its folder, its cache, its resuming."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm_cli.families.adapted import adaptable_models, adaptable_networks
from ldm_cli.families.lora_reader import read_lora
from ldm_cli.families.open_family import open_family
from ldm_cli.families.stable_diffusion_3 import StableDiffusion3
from ldm_cli.recipe.schema import TrainUnetRecipe
from ldm_cli.stages.support.start import resolve_start

from ..faults.runs import assert_same_run
from .test_precompute import assert_a_cache_changes_nothing
from .tiny import lose_after, trained
from .tiny_sd3 import save_tiny_sd3, sd3_recipe, tiny_sd3


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
        scenes, parts if has_t5 else without_t5, {"encoder_dropout": 0.3}, steps=4, log_every=1, save_every=4
    )
    assert_a_cache_changes_nothing(recipe, tmp_path)


def test_a_lost_run_ends_in_the_same_weights(scenes: Path, parts: dict[str, str], tmp_path: Path) -> None:
    recipe = sd3_recipe(scenes, parts, {"encoder_dropout": 0.464}, steps=4, save_every=2, ema_decay=0.9)
    trained(recipe, tmp_path / "whole")
    lose_after(2, recipe, tmp_path / "broken")
    trained(recipe, tmp_path / "broken")
    assert_same_run(tmp_path / "whole", tmp_path / "broken", 4)


def test_a_run_begins_at_a_folder_and_trains_what_is_not_frozen(
    scenes: Path, parts: dict[str, str], tmp_path: Path
) -> None:
    folder = str(Path(parts["vae"]).parent)
    recipe = sd3_recipe(scenes, {}, steps=3)
    recipe = {name: value for name, value in recipe.items() if name not in ("vae", "text_encoder", "transformer")}
    recipe |= {"start_from": folder, "freeze": ["*", "!proj_out.*"], "diffusion": {}}
    filled = resolve_start(TrainUnetRecipe.from_mapping(recipe), pytest.fail)
    assert filled.component == "transformer"
    assert filled.text_encoder_3 == parts["text_encoder_3"]
    assert filled.max_sequence_length == 9
    assert (filled.diffusion.prediction_type, filled.diffusion.flow_shift) == ("flow_prediction", 3.0)
    trained(recipe, tmp_path)
    before, after = tiny_sd3().denoiser.state_dict(), open_family(tmp_path).denoiser.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"proj_out.weight", "proj_out.bias"}


def test_adapters_of_the_transformer_are_trained_resumed_and_read_by_diffusers(
    scenes: Path, parts: dict[str, str], tmp_path: Path
) -> None:
    diffusers = pytest.importorskip("diffusers")
    recipe = sd3_recipe(scenes, {}, steps=4, save_every=2, lr=1e-2)
    recipe = {name: value for name, value in recipe.items() if name not in ("vae", "text_encoder", "transformer")}
    recipe |= {"start_from": str(Path(parts["vae"]).parent), "diffusion": {}, "lora": {"rank": 2, "targets": ["all"]}}
    trained(recipe, tmp_path / "whole")
    lose_after(2, recipe, tmp_path / "broken")
    trained(recipe, tmp_path / "broken")
    assert_same_run(tmp_path / "whole", tmp_path / "broken", 4)
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
