"""`train-unet` with `low_resolution`: pictures enlarged in latents and in pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_cli.core.condition import Condition
from ldm_cli.core.low_resolution_config import LowResolutionConfig
from ldm_cli.data.batch import Batch
from ldm_cli.errors import RecipeError
from ldm_cli.families.low_resolution import LowResolution
from ldm_cli.families.open_family import open_family, outline_family
from ldm_cli.families.pixel_upscale import NOISING_BETAS, PixelUpscale
from ldm_cli.families.stable_diffusion_upscale import StableDiffusionUpscale
from ldm_cli.recipe.schema import TrainUnetRecipe
from ldm_cli.stages.support.low_resolution import LowResolutionTraining
from ldm_cli.stages.train_unet import parameters

from ..faults.runs import assert_same_run
from .tiny import lose_after, losses, trained, unet_recipe

KINDS = ("latents", pytest.param("pixels", marks=pytest.mark.exhaustive))


def upscale_recipe(kind: str, scenes: Path, clip: Path, vae: Path, **train: Any) -> dict[str, Any]:
    recipe = unet_recipe(scenes, clip, vae if kind == "latents" else Path("pixels"), data={"crop": "native"}, **train)
    fields: dict[str, Any] = {"in_channels": 6, "num_class_embeds": 40}
    if kind == "pixels":
        fields = {"in_channels": 6, "out_channels": 6, "class_embed_type": "timestep"}
    low = {"factor": 2, "noise_augmentation": 30, "blur": 0.5, "jpeg": 40}
    return recipe | {"unet": recipe["unet"] | fields, "low_resolution": low}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns_resumes_in_the_same_bits_and_ends_as_a_folder_that_enlarges(
    kind: str, scenes: Path, clip_run: Path, vae_run: Path, tmp_path: Path
) -> None:
    recipe = upscale_recipe(kind, scenes, clip_run / "model", vae_run / "model", steps=16, lr=1e-2, ema_decay=0.9)
    recipe["train"] |= {"save_every": 8, "log_every": 4}
    run = tmp_path / "run"
    trained(recipe, run)
    found = losses(run)
    assert found[-1] < 0.9 * found[0]
    assert (run / "samples/step-00000016/grid.png").is_file()
    lose_after(8, recipe, tmp_path / "lost")
    trained(recipe, tmp_path / "lost")
    assert_same_run(run, tmp_path / "lost", 16)

    family = open_family(run)
    assert isinstance(family, StableDiffusionUpscale if kind == "latents" else PixelUpscale)
    low = family.low_resolution
    assert low is not None
    assert (low.factor, low.max_noise_level, low.noise_level) == (2, 30, 20)
    assert next(iter(outline_family(run / "model"))) == "unet"


@pytest.mark.parametrize("kind", KINDS)
def test_training_begins_at_a_trained_upscaler(
    kind: str, scenes: Path, clip_run: Path, vae_run: Path, tmp_path: Path
) -> None:
    recipe = upscale_recipe(kind, scenes, clip_run / "model", vae_run / "model", steps=1)
    trained(recipe, tmp_path / "first")
    for name in ("unet", "vae", "text_encoder"):
        del recipe[name]
    trained(recipe | {"start_from": str(tmp_path / "first")}, tmp_path / "second")
    assert type(open_family(tmp_path / "second")) is type(open_family(tmp_path / "first"))


def batch(positions: list[int], images: Tensor) -> Batch:
    position = torch.tensor(positions)
    keys = [str(i) for i in positions]
    return Batch(images[position], [""] * len(keys), None, keys, torch.zeros_like(position), position)


def test_small_pictures_levels_and_noise_are_functions_of_the_sample() -> None:
    config = LowResolutionConfig(factor=4, noise_augmentation=300, blur=1.0, jpeg=30)
    low = LowResolution(4, 4, 300, 20, NOISING_BETAS)
    images = torch.randint(0, 256, (64, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    training = LowResolutionTraining(config, low, seed=3)
    whole = training(Condition(), batch(list(range(64)), images), {}, is_training=True)
    part = training(Condition(), batch([40, 7], images), {}, is_training=True)
    assert whole.concat is not None
    assert whole.pooled is not None
    assert part.concat is not None
    assert whole.concat.shape == (64, 3, 32, 32)
    assert torch.equal(part.concat, whole.concat[[40, 7]])
    assert torch.equal(part.pooled, whole.pooled[[40, 7]])  # type: ignore[arg-type]
    assert whole.pooled.dtype == torch.int64
    assert 0 <= int(whole.pooled.min()) < 40
    assert 260 < int(whole.pooled.max()) <= 300
    other = LowResolutionTraining(config, low, seed=4)(Condition(), batch([40], images), {}, is_training=True)
    assert not torch.equal(other.pooled, part.pooled[:1])  # type: ignore[arg-type, index]
    held_out = training(Condition(), batch([40, 7], images), {}, is_training=False)
    assert held_out.pooled.tolist() == [20, 20]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("latents", {"low_resolution": {"factor": 4}}, "low_resolution.factor=4, but the autoencoder's is 2"),
        ("latents", {"low_resolution": {"factor": 2}}, "num_class_embeds=40, but noise has levels up to 350"),
        ("pixels", {"low_resolution": None}, "unet.in_channels=6, expected 3"),
        ("pixels", {"low_resolution": {"factor": 5}}, "data.image_size=32 is no multiple"),
    ],
)
def test_parts_that_do_not_fit_are_named(
    kind: str, change: dict[str, Any], message: str, scenes: Path, clip_run: Path, vae_run: Path
) -> None:
    recipe = upscale_recipe(kind, scenes, clip_run / "model", vae_run / "model") | change
    if change["low_resolution"] is None:
        recipe["unet"] = recipe["unet"] | {"class_embed_type": None}
    with pytest.raises(RecipeError, match=message):
        parameters(TrainUnetRecipe.from_mapping(recipe), [])


def test_a_cache_and_class_labels_are_refused() -> None:
    recipe = upscale_recipe("pixels", Path(), Path("clip"), Path())
    with pytest.raises(ValueError, match="low_resolution does not go with lora"):
        TrainUnetRecipe.from_mapping(recipe | {"lora": {"rank": 2}, "start_from": "run"})
    latents = upscale_recipe("latents", Path(), Path("clip"), Path("vae"))
    with pytest.raises(ValueError, match="low_resolution does not go with cache"):
        TrainUnetRecipe.from_mapping(latents | {"cache": "cache"})
    for name in ("image_embedding", "image_prompt"):
        with pytest.raises(ValueError, match=f"low_resolution does not go with {name}"):
            TrainUnetRecipe.from_mapping(latents | {name: {"image_encoder": "clip"}, "start_from": "run"})
