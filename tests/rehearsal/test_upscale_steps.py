"""The host touches of denoisers that enlarge pictures, in latents and in pixels."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from ..stages.test_train_upscale import upscale_recipe
from . import worker as work
from .test_steps import STEPS, TOUCHES, trained_on_both


@pytest.mark.parametrize("kind", [pytest.param("latents", marks=pytest.mark.exhaustive), "pixels"])
def test_neither_a_step_of_training_nor_one_of_sampling_touches_the_host_for_small_pictures(
    kind: str, parts: Path, worker: ProcessPoolExecutor, tmp_path: Path
) -> None:
    recipe = upscale_recipe(kind, parts / "scenes", parts / "clip/model", parts / "vae/model", **STEPS)
    recipe["samples"] |= {"num_prompts": 1}
    assert trained_on_both(recipe, worker, tmp_path)["touches"] == TOUCHES
    sampling = {"sampler": "ddpm", "steps": 3, "images_per_prompt": 2, "side": 8, "width": 8, "height": 8}
    made = [worker.submit(work.sample, tmp_path / "on the CPU/model", **sampling) for _ in range(2)]
    assert made[1].result()["touches"] == []
    assert made[1].result()["rows"] == [4, 4, 4]
