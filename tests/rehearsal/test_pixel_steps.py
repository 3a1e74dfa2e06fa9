"""The host touches of denoisers of pixels, with classes and text."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from ..stages.test_train_pixels import class_recipe, labelled
from . import worker as work
from .test_steps import STEPS, TOUCHES, trained_on_both

__all__ = ["labelled"]


@pytest.mark.parametrize("has_text", [True, False])
def test_a_step_touches_the_host_for_its_batch_alone(
    has_text: bool, labelled: Path, parts: Path, worker: ProcessPoolExecutor, tmp_path: Path
) -> None:
    recipe = class_recipe(labelled, parts / "clip/model" if has_text else None, **STEPS)
    recipe["samples"] |= {"num_prompts": 1}
    assert trained_on_both(recipe, worker, tmp_path)["touches"] == TOUCHES
    prompt = "a red circle" if has_text else "star"
    made = [worker.submit(work.sample, tmp_path / "on the CPU/model", prompt=prompt, steps=3) for _ in range(2)]
    assert made[1].result()["touches"] == []
