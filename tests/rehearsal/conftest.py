"""Small models, and the process with the simulated device."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from ldm_cli.data.scenes import write_scenes
from ldm_cli.reporting import SilentReporter

from ..sampling.tiny import tiny_pipeline
from ..sampling.tiny_ar import save_tiny_model
from ..stages.tiny import ar_recipe, cached, clip_recipe, decoder_recipe, prior_recipe, trained, unet_recipe, vae_recipe
from ..stages.tiny_sd3 import save_tiny_sd3, sd3_recipe
from ..stages.tiny_xl import save_tiny_xl, xl_recipe
from . import device


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of `scenes`, `clip` and `vae` models that were hardly trained, `xl` and `sd3` pipelines, an
    autoregressive model `ar`, and `cache`, `decoder cache`, `prior cache`, `xl cache`, `sd3 cache` and `codes` of their
    encodings."""
    folder = tmp_path_factory.mktemp("rehearsal")
    scenes = folder / "scenes"
    write_scenes(scenes, 40, 32, 0, SilentReporter(), val_samples=8, shard_samples=20)
    trained(clip_recipe(scenes, steps=1), folder / "clip")
    trained(vae_recipe(scenes, steps=1), folder / "vae")
    recipes = {
        "cache": unet_recipe(scenes, folder / "clip/model", folder / "vae/model"),
        "decoder cache": decoder_recipe(scenes, folder / "clip/model", folder / "vae/model"),
        "xl cache": xl_recipe(scenes, save_tiny_xl(folder / "xl")),
        "sd3 cache": sd3_recipe(scenes, save_tiny_sd3(folder / "sd3")),
    }
    for name, recipe in recipes.items():
        cached(recipe, folder / name, "fp32")
    cached(prior_recipe(scenes, folder / "clip/model"), folder / "prior cache", "fp32")
    save_tiny_model(folder / "ar")
    cached(ar_recipe(scenes, folder / "ar/vq"), folder / "codes", "fp32")
    return folder


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small pipeline."""
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline().family.save(folder)
    return folder


@pytest.fixture(scope="session")
def worker() -> Iterator[ProcessPoolExecutor]:
    """The process with the device."""
    if not device.IS_POSSIBLE:
        pytest.skip("this torch cannot simulate a device")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), device.register) as executor:
        yield executor
