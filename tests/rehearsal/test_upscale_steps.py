"""The host touches of denoisers that enlarge pictures, in latents and in pixels."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from ..stages.test_train_upscale import KINDS, upscale_recipe
from ..stages.tiny import losses, trained
from . import worker as work
from .test_steps import STEPS, TOUCHES


@pytest.mark.parametrize("kind", KINDS)
def test_neither_a_step_of_training_nor_one_of_sampling_touches_the_host_for_small_pictures(
    kind: str, parts: Path, worker: ProcessPoolExecutor, tmp_path: Path
) -> None:
    recipe = upscale_recipe(kind, parts / "scenes", parts / "clip/model", parts / "vae/model", **STEPS)
    recipe["samples"] |= {"num_prompts": 1}
    rehearsed = worker.submit(work.train, recipe, tmp_path / "run", None).result()
    assert rehearsed["touches"] == TOUCHES
    trained(recipe, tmp_path / "on the CPU")
    assert rehearsed["losses"] == pytest.approx(losses(tmp_path / "on the CPU"), rel=1e-6)
    sampling = {"sampler": "ddpm", "steps": 3, "images_per_prompt": 2, "side": 8, "width": 8, "height": 8}
    made = [worker.submit(work.sample, tmp_path / "on the CPU/model", **sampling) for _ in range(2)]
    assert made[1].result()["touches"] == []
    assert made[1].result()["rows"] == [4, 4, 4]
