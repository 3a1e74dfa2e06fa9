"""The host touches of a training step, one by one: no step waits for the device."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ldm_cli.errors import CheckpointError

from ..stages.tiny import (
    ar_recipe,
    clip_recipe,
    decoder_recipe,
    losses,
    prior_recipe,
    trained,
    unet_recipe,
    vae_recipe,
    vq_recipe,
)
from ..stages.tiny_sd3 import sd3_recipe
from ..stages.tiny_xl import xl_recipe
from . import worker as work

STEPS = {"steps": 3, "log_every": 3, "save_every": 3, "ema_decay": 0.9, "validation_samples": 4}
DENOISERS = [f"{model} from {source}" for model in ("unet", "xl", "sd3") for source in ("cache", "images")]
PATCHES = {"sd3, patches left out": {"left_out": 0.75}, "sd3, patches aligned": {"aligned_block": 1}}
UNCLIP = [f"{model} from {source}" for model in ("prior", "decoder") for source in ("cache", "images")]
IMAGE_PROMPTS = {"image prompt": {}, "image prompt plus": {"kind": "plus", "num_tokens": 3, "width": 64}}
ADDED = (*PATCHES, *UNCLIP, *IMAGE_PROMPTS)
TRAINERS = (*DENOISERS, *ADDED, "lora", "vae", "vq", "clip", "ar from cache", "ar from images")
ADAPTERS = {"rank": 2, "targets": ["all"], "conv_rank": 2, "text_encoder": True, "dropout": 0.1, "dora": True}
IN_HALF = [*(f"{name} from images" for name in ("xl", "sd3", "prior", "decoder", "ar")), "image prompt"]
"""Trainers whose steps are tested in half precision, and in full precision from a cache or of a like kind."""
TOUCHES = ["send to_device.py:_sent"]


def trained_on_both(recipe: Mapping[str, Any], worker: ProcessPoolExecutor, folder: Path) -> dict[str, Any]:
    """Train on the device and on the CPU, with the same losses: what the device was touched for, and more."""
    rehearsed: dict[str, Any] = worker.submit(work.train, recipe, folder / "run").result()
    trained(recipe, folder / "on the CPU")
    assert rehearsed["losses"] == pytest.approx(losses(folder / "on the CPU"), rel=1e-6)
    return rehearsed


def recipe_of(trainer: str, parts: Path, **train: Any) -> Mapping[str, Any]:
    train, scenes = STEPS | train, parts / "scenes"
    if trainer == "clip":
        return clip_recipe(scenes, **train)
    if trainer == "vae":
        loss = {"adversarial_weight": 0.5, "adversarial_start": 0}
        return vae_recipe(
            scenes, loss | {"perceptual_weight": 0.1, "perceptual_clip": str(parts / "clip/model")}, **train
        )
    if trainer == "vq":
        return vq_recipe(scenes, **train)
    model, _, source = trainer.partition(" from ")
    if model == "ar":
        return ar_recipe(scenes, parts / "ar/vq", **train) | (
            {"cache": str(parts / "codes")} if source == "cache" else {}
        )
    if model == "prior":
        recipe = dict(prior_recipe(scenes, parts / "clip/model", **train))
        return recipe | ({"cache": str(parts / "prior cache")} if source == "cache" else {})
    diffusion = {"caption_dropout": 0.1, "snr_gamma": 5.0}
    if trainer == "lora" or trainer in IMAGE_PROMPTS:
        recipe = xl_recipe(scenes, {}, diffusion, **train) | {"start_from": str(parts / "xl")}
        image_prompt = {"image_encoder": str(parts / "clip/model"), **IMAGE_PROMPTS.get(trainer, {})}
        recipe |= {"lora": ADAPTERS} if trainer == "lora" else {"image_prompt": image_prompt}
        recipe["samples"] |= {"num_prompts": 1}
        return {field: value for field, value in recipe.items() if field not in ("unet", "vae", "text_encoder")}
    if model == "xl":
        models = {name: str(parts / "xl" / name) for name in ("vae", "text_encoder", "text_encoder_2")}
        recipe, cache = xl_recipe(scenes, models, diffusion, **train), "xl cache"
    elif model.startswith("sd3"):
        names = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
        models, every = {name: str(parts / "sd3" / name) for name in names}, {"encoder_dropout": 0.4}
        recipe, cache = sd3_recipe(scenes, models, diffusion | every, **train), "sd3 cache"
        recipe["patches"] = dict(PATCHES.get(trainer, {}))
        if trainer == "sd3, patches aligned":
            recipe["patches"]["clip"] = str(parts / "clip/model")
    elif model == "decoder":
        models = {"clip": parts / "clip/model", "vae": parts / "vae/model"}
        recipe, cache = decoder_recipe(scenes, **models, diffusion=diffusion, **train), "decoder cache"
    else:
        recipe, cache = unet_recipe(scenes, parts / "clip/model", parts / "vae/model", diffusion, **train), "cache"
    recipe["samples"] |= {"num_prompts": 1}
    return recipe | ({"cache": str(parts / cache)} if source == "cache" else {})


@pytest.mark.parametrize(
    "trainer", [pytest.param(name, marks=pytest.mark.exhaustive if name in IN_HALF else ()) for name in TRAINERS]
)
def test_a_step_touches_the_host_for_its_batch_alone(
    trainer: str, parts: Path, worker: ProcessPoolExecutor, tmp_path: Path
) -> None:
    assert trained_on_both(recipe_of(trainer, parts), worker, tmp_path)["touches"] == TOUCHES


def test_figures_are_copied_once_for_a_line_and_read_with_the_next(
    parts: Path, worker: ProcessPoolExecutor, tmp_path: Path
) -> None:
    rehearsed = trained_on_both(recipe_of("vq", parts, steps=5, log_every=1), worker, tmp_path)
    assert rehearsed["touches"] == ["fetch host_copy.py:host_copy", *TOUCHES]
    assert len(rehearsed["losses"]) == 5
    assert rehearsed["lines_after_each_step"] == [0, 0, 1, 3, 3], "the save after step 3 waits"


def test_a_run_goes_on_with_the_kind_of_device_that_it_began_with(
    parts: Path, worker: ProcessPoolExecutor, tmp_path: Path
) -> None:
    trained(recipe_of("clip", parts, steps=1), tmp_path / "run")
    with pytest.raises(CheckpointError, match="device: 'cpu' → 'simulated'"):
        worker.submit(work.train, recipe_of("clip", parts, steps=1), tmp_path / "run").result()


@pytest.mark.parametrize("trainer", [*IN_HALF, "lora", "vae", "vq", "clip"])
def test_a_step_in_half_precision_touches_the_host_no_more(
    trainer: str, parts: Path, worker: ProcessPoolExecutor, tmp_path: Path
) -> None:
    recipe = recipe_of(trainer, parts, precision="bf16")
    rehearsed = worker.submit(work.train, recipe, tmp_path / "run", ends_early=True).result()
    assert rehearsed["touches"] == TOUCHES


def test_precompute_waits_for_nothing_but_the_encodings_that_it_writes(
    parts: Path, worker: ProcessPoolExecutor, tmp_path: Path
) -> None:
    touches = worker.submit(work.precomputed, recipe_of("unet from images", parts), tmp_path / "cache").result()
    assert {touch for touch in touches if touch != "send, blocking family.py:place"} == {
        "send to_device.py:_sent",
        "send clip_text_encoder.py:_condition",
        "fetch, blocking cache_encoding.py:_kept",
    }
