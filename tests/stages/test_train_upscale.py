"""`train-unet` with `low_resolution`: pictures enlarged in latents and in pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_cli.families.open_family import open_family, outline_family
from ldm_cli.families.pixel_upscale import PixelUpscale
from ldm_cli.families.stable_diffusion_upscale import SCALING_FACTOR, StableDiffusionUpscale

from ..faults.runs import assert_same_run
from .tiny import lose_after, losses, trained, unet_recipe

KINDS = ("latents", "pixels")


def upscale_recipe(kind: str, scenes: Path, clip: Path, vae: Path, **train: Any) -> dict[str, Any]:
    recipe = unet_recipe(scenes, clip, vae if kind == "latents" else Path("pixels"), data={"crop": "native"}, **train)
    fields: dict[str, Any] = {"in_channels": 6, "num_class_embeds": 40}
    if kind == "pixels":
        fields = {"in_channels": 6, "out_channels": 6, "class_embed_type": "timestep"}
    low = {"factor": 2, "noise_augmentation": 30, "blur": 0.5, "jpeg": 40}
    return recipe | {"unet": recipe["unet"] | fields, "low_resolution": low}


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_is_a_folder_that_enlarges(
    kind: str, scenes: Path, clip_run: Path, vae_run: Path, tmp_path: Path
) -> None:
    recipe = upscale_recipe(kind, scenes, clip_run / "model", vae_run / "model", steps=30, lr=5e-3, ema_decay=0.9)
    trained(recipe, tmp_path / "run")
    found = losses(tmp_path / "run")
    assert found[-1] < 0.9 * found[0]
    assert (tmp_path / "run/samples/step-00000030/grid.png").is_file()
    family = open_family(tmp_path / "run")
    assert isinstance(family, StableDiffusionUpscale if kind == "latents" else PixelUpscale)
    low = family.low_resolution
    assert low is not None
    assert (low.factor, low.max_noise_level, low.noise_level) == (2, 30, 20)
    assert list(outline_family(tmp_path / "run/model"))[0] == "unet"


def test_the_latents_are_brought_to_the_unit_of_the_pipeline(
    scenes: Path, clip_run: Path, vae_run: Path, tmp_path: Path
) -> None:
    recipe = upscale_recipe("latents", scenes, clip_run / "model", vae_run / "model", steps=1)
    trained(recipe, tmp_path / "run")
    ours = open_family(tmp_path / "run")
    theirs = open_family(vae_run.parent / "unet" if False else tmp_path / "run").codec
    from ldm_cli.families.codec_folder import open_codec

    trained_on, saved = open_codec(vae_run / "model"), ours.codec
    assert saved.config.scaling_factor == SCALING_FACTOR  # type: ignore[attr-defined]
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = trained_on.encode(images)
    assert torch.allclose(saved.encode(images), latents, atol=2e-5)
    assert torch.allclose(saved.decode(latents), trained_on.decode(latents), atol=2e-5)
    moments = saved.moments(images), trained_on.moments(images)
    noise = torch.ones_like(latents)
    assert torch.allclose(saved.latents(moments[0], noise), trained_on.latents(moments[1], noise), atol=2e-5)
    del theirs


@pytest.mark.parametrize("kind", KINDS)
def test_a_lost_run_ends_in_the_same_bits(
    kind: str, scenes: Path, clip_run: Path, vae_run: Path, tmp_path: Path
) -> None:
    recipe = upscale_recipe(kind, scenes, clip_run / "model", vae_run / "model", ema_decay=0.9, micro_batch=4)
    trained(recipe, tmp_path / "whole")
    lose_after(5, recipe, tmp_path / "lost")
    trained(recipe, tmp_path / "lost")
    assert_same_run(tmp_path / "whole", tmp_path / "lost")
