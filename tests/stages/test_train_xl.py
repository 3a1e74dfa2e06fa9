"""`train-unet` of Stable Diffusion XL: two text encoders, sizes, its folder, its cache, its resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_cli.core.condition import Condition
from ldm_cli.data.latent_cache import LatentCache
from ldm_cli.data.loader import Loader
from ldm_cli.data.open_shards import open_shards
from ldm_cli.errors import RecipeError
from ldm_cli.families.open_family import open_family
from ldm_cli.families.stable_diffusion_xl import StableDiffusionXL
from ldm_cli.recipe.schema import TrainUnetRecipe
from ldm_cli.reporting import SilentReporter
from ldm_cli.stages.dry_run import dry_run
from ldm_cli.stages.support.batch_encoder import BatchEncoder, cache_key
from ldm_cli.stages.support.options import RunOptions, with_precision
from ldm_cli.stages.support.start import resolve_start
from ldm_cli.stages.train_unet import DenoiserTask
from tests.data.tars import png, write_tar

from .test_precompute import assert_a_cache_changes_nothing
from .test_preview_vae import tiny_autoencoder
from .tiny import assert_resumes, cached, trained, workbench
from .tiny_xl import encoder, save_tiny_xl, xl_recipe


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An autoencoder and two text encoders, untrained."""
    return save_tiny_xl(tmp_path_factory.mktemp("xl"))


def make_task(recipe: dict[str, Any], path: Path) -> tuple[DenoiserTask, Loader]:
    config = TrainUnetRecipe.from_mapping(recipe)
    bench = workbench(config, path)
    return DenoiserTask(config, bench), Loader(bench.shards, config.data, seed=0, batch_size=8)


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_a_dropped_caption_is_zeros_and_the_sizes_stay(
    scenes: Path, parts: dict[str, str], tmp_path: Path, dropout: float
) -> None:
    recipe = xl_recipe(scenes, parts)
    recipe["diffusion"] = {"caption_dropout": dropout}
    task, loader = make_task(recipe, tmp_path)
    (batch,) = loader.batches(0, 1)
    seen: list[Condition] = []

    def watched(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        seen.append(condition)
        return torch.zeros_like(x)

    object.__setattr__(task.family, "denoiser", watched)
    task.loss(task.prepare(batch), 0)
    (condition,) = seen
    assert condition.tokens is not None
    assert condition.pooled is not None
    assert batch.sizes is not None
    assert condition.tokens.shape == (8, 12, 24)
    text, sizes = condition.pooled[:, :12], condition.pooled[:, 12:]
    for tensor in (condition.tokens, text):
        assert torch.equal(tensor.flatten(1).any(1), torch.full((8,), dropout == 0.0))
    assert torch.equal(sizes, batch.sizes.float())
    assert sizes[:, [0, 1, 4, 5]].unique(dim=0).tolist() == [[32.0, 32.0, 24.0, 24.0]]


def test_a_run_writes_a_folder_that_we_and_diffusers_open(scenes: Path, parts: dict[str, str], tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    trained(xl_recipe(scenes, parts, steps=3, ema_decay=0.9), tmp_path)
    family = open_family(tmp_path)
    assert isinstance(family, StableDiffusionXL)
    assert family.weights_sha256.keys() == {"unet", "vae", "text_encoder", "text_encoder_2"}
    assert (tmp_path / "samples/step-00000003/grid.png").is_file()
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "model")
    assert type(theirs.text_encoder_2).__name__ == "CLIPTextModelWithProjection"
    assert theirs.config.force_zeros_for_empty_prompt
    assert theirs.tokenizer_2("a", padding="max_length", max_length=6).input_ids[-1] == theirs.tokenizer_2.vocab["!"]
    ours = family.denoiser.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.unet.state_dict().items())


@pytest.mark.parametrize("is_tiny", [False, True])
def test_training_from_a_cache_gives_the_same_weights_and_losses(
    scenes: Path, parts: dict[str, str], tmp_path: Path, is_tiny: bool
) -> None:
    recipe = xl_recipe(scenes, parts, steps=5, log_every=1, save_every=5)
    if is_tiny:
        recipe["vae"] = str(tiny_autoencoder(tmp_path / "tiny", latent_channels=3))
    assert_a_cache_changes_nothing(recipe, tmp_path)


def test_a_lost_run_ends_in_the_same_weights(scenes: Path, parts: dict[str, str], tmp_path: Path) -> None:
    recipe = xl_recipe(scenes, parts, steps=4, save_every=2)
    assert_resumes(recipe, tmp_path, 2)


def test_a_run_begins_at_a_folder_with_both_of_its_text_encoders(
    scenes: Path, parts: dict[str, str], tmp_path: Path
) -> None:
    trained(xl_recipe(scenes, parts, steps=1), tmp_path / "first")
    recipe = xl_recipe(scenes, dict.fromkeys(parts, ""), steps=1) | {"start_from": str(tmp_path / "first")}
    filled = resolve_start(TrainUnetRecipe.from_mapping({**recipe, "unet": None}), pytest.fail)
    assert filled.text_encoder_2 == str(tmp_path / "first/model/text_encoder_2")
    assert filled.model.addition_embed_type == "text_time"


@pytest.mark.parametrize(("crop", "flip"), [("center", 0.5), ("center", 1.0), ("squash", 0.5)])
def test_a_cache_keeps_the_sizes_of_training(parts: dict[str, str], tmp_path: Path, crop: str, flip: float) -> None:
    members = [
        (f"{i}.{kind}", data)
        for i, size in enumerate([(25, 24), (24, 31), (60, 40), (24, 24), (33, 90)])
        for kind, data in (("png", png(size=size)), ("txt", b"a red circle"))
    ]
    write_tar(tmp_path / "0.tar", members)
    recipe = xl_recipe(tmp_path, parts, steps=1, batch_size=20)
    recipe["data"] |= {"shards": str(tmp_path / "0.tar"), "val_shards": None, "crop": crop, "flip_probability": flip}
    wanted = TrainUnetRecipe.from_mapping(cached(recipe, tmp_path / "cache"))
    wanted = with_precision(wanted, RunOptions(device="cpu"))
    shards = open_shards(wanted.data.shards, wanted.data, SilentReporter())
    cache = LatentCache(tmp_path / "cache", shards, cache_key(wanted), SilentReporter())
    (plain,), (from_cache,) = (
        Loader(shards, wanted.data, seed=0, batch_size=20, cache=c).batches(0, 1) for c in (None, cache)
    )
    assert plain.sizes is not None
    assert from_cache.sizes is not None
    assert torch.equal(plain.sizes, from_cache.sizes)
    assert len(plain.sizes.unique(dim=0)) >= 5
    moments = BatchEncoder(wanted, torch.device("cpu"), list).moments(plain.images)
    torch.testing.assert_close(from_cache.moments, moments)


@pytest.mark.parametrize(
    ("unet", "fields", "message"),
    [
        ({}, {"text_encoder_2": ""}, "addition_embed_type=text_time asks for a condition .* or give text_encoder_2"),
        ({"addition_embed_type": None}, {}, "unet.addition_embed_type=None, expected text_time"),
        ({"projection_class_embeddings_input_dim": 59}, {}, "12 numbers of pooled text and 6 sizes of 8 make 60"),
        ({"cross_attention_dim": 16}, {}, "unet.cross_attention_dim=16, but '.*text_encoder' and '.*_2' give 24"),
    ],
)
def test_parts_that_do_not_fit_are_named_in_the_dry_run(
    scenes: Path, parts: dict[str, str], unet: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    recipe = xl_recipe(scenes, parts) | fields
    recipe["unet"] |= unet
    with pytest.raises(RecipeError, match=message):
        dry_run(TrainUnetRecipe.from_mapping(recipe), SilentReporter())


def test_buckets_that_the_autoencoder_cannot_take_are_named(scenes: Path, parts: dict[str, str]) -> None:
    recipe = xl_recipe(scenes, parts)
    recipe["data"]["aspect_buckets"] = {"step": 9}
    with pytest.raises(RecipeError, match=r"data\.aspect_buckets\.step=9 is no multiple of 2"):
        dry_run(TrainUnetRecipe.from_mapping(recipe), SilentReporter())


def test_the_dry_run_counts_both_text_encoders(scenes: Path, parts: dict[str, str]) -> None:
    result = dry_run(TrainUnetRecipe.from_mapping(xl_recipe(scenes, parts)), SilentReporter())
    assert result["parameters"].keys() == {"unet", "vae", "text_encoder", "text_encoder_2"}
    models = encoder("!", False).model, encoder("!", True).model
    expected = [sum(p.numel() for p in model.parameters()) for model in models]
    assert [result["parameters"][name] for name in ("text_encoder", "text_encoder_2")] == expected
