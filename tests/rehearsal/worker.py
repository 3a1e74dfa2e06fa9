"""What the process with the simulated device does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_cli.families.autoregressive import Autoregressive
from ldm_cli.families.open_family import open_family
from ldm_cli.recipe.schema import TrainUnetRecipe
from ldm_cli.reporting import SilentReporter
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.edit_input import EditInput
from ldm_cli.sampling.picture_pipeline import PicturePipeline
from ldm_cli.sampling.pipeline_of import pipeline_of
from ldm_cli.sampling.request import requests_for
from ldm_cli.sampling.sample_options import SampleOptions
from ldm_cli.stages import precompute
from ldm_cli.stages.support import training_run
from ldm_cli.stages.support.options import RunOptions
from ldm_cli.training.trainer import Trainer

from ..stages.tiny import Lost, losses, trained
from . import device

PLAIN_STEP = 2
"""The second of three steps: nothing is made for the first time, and nothing is due after it."""


def train(
    recipe: Mapping[str, Any],
    out: Path,
    plant: Callable[[pytest.MonkeyPatch], None] | None = None,
    ends_early: bool = False,
) -> dict[str, Any]:
    """Train on the device.

    Args:
        recipe: of at least three steps.
        out: run folder.
        plant: changes the code before.
        ends_early: the run ends after the second step, without losses.

    Returns:
        `touches` between the ends of the first and the second step, the logged `losses`, and `lines_after_each_step`
        of metrics.jsonl, before the loop goes on.
    """
    ends: list[int] = []
    lines: list[int] = []
    advance = Trainer.advance

    def counted(trainer: Trainer, batch: Any) -> None:
        advance(trainer, batch)
        ends.append(len(device.touches))
        metrics = out / "metrics.jsonl"
        lines.append(len(metrics.read_text(encoding="utf-8").splitlines()) if metrics.exists() else 0)
        if ends_early and trainer.step == PLAIN_STEP:
            raise Lost

    device.touches.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "advance", counted)
        patch.setattr(training_run, "resolve_device", lambda *_: torch.device(device.NAME, 0))
        if plant is not None:
            plant(patch)
        with suppress(Lost):
            trained(recipe, out)
    made = [] if ends_early else losses(out)
    return {
        "touches": device.touches[ends[PLAIN_STEP - 2] : ends[PLAIN_STEP - 1]],
        "losses": made,
        "lines_after_each_step": lines,
    }


def precomputed(recipe: Mapping[str, Any], folder: Path) -> list[str]:
    """Write the cache of a recipe on the device; returns the touches."""
    wanted = TrainUnetRecipe.from_mapping({**recipe, "cache": str(folder)})
    device.touches.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precompute, "resolve_device", lambda *_: torch.device(device.NAME, 0))
        precompute.run(wanted, RunOptions(), SilentReporter(), "fp32")
    return list(device.touches)


def sample(
    folder: Path,
    plant: Callable[[pytest.MonkeyPatch], None] | None = None,
    prompt: str = "a red circle",
    side: int | None = None,
    **sampling: Any,
) -> dict[str, Any]:
    """Generate pictures on the device from a pipeline's folder.

    Args:
        folder: of the pipeline.
        plant: changes the code before.
        prompt: of the pictures.
        side: of the picture that is enlarged; None: of none.
        sampling: fields of the configuration.

    Returns:
        `touches` between the first call of the network and the last; the `rows` of each call; the `pixels`.
    """
    pipeline = _opened(folder)
    family: Any = pipeline.family
    network = family.transformer.model if isinstance(family, Autoregressive) else family.denoiser
    config = SamplingConfig.from_mapping(sampling)
    calls: list[tuple[int, int]] = []

    def called(_: object, given: tuple[Tensor, ...]) -> None:
        calls.append((len(given[0]), len(device.touches)))

    device.touches.clear()
    with pytest.MonkeyPatch.context() as patch, network.register_forward_pre_hook(called):
        if plant is not None:
            plant(patch)
        options = SampleOptions()
        if side is not None:
            options = SampleOptions(EditInput(torch.zeros(3, side, side, dtype=torch.uint8), None, (side, side), 0.8))
        pictures = pipeline.generate(requests_for([prompt], config), config, options=options)
        pixels = [picture.pixels.tolist() for picture in pictures]
    touches = device.touches[calls[0][1] : calls[-1][1]]
    return {"touches": touches, "rows": [rows for rows, _ in calls], "pixels": pixels}


@cache
def _opened(folder: Path) -> PicturePipeline:
    return pipeline_of(open_family(folder, torch.device(device.NAME, 0)))
