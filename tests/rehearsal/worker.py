"""What the process of the simulated device does; it is started once, for torch must meet the device before it computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_cli.stages.support import training_run
from ldm_cli.training.trainer import Trainer

from ..stages.tiny import losses, trained
from . import device

PLAIN_STEP = 2
"""The second of three steps: nothing is made for the first time, and nothing is due after it."""


def begin() -> None:
    """Register the device in this process."""
    torch.set_num_threads(1)
    device.register()


def train(recipe: Mapping[str, Any], out: Path, plant: Callable[[pytest.MonkeyPatch], None] | None) -> dict[str, Any]:
    """Train on the device.

    Args:
        recipe: of at least three steps.
        out: run folder.
        plant: changes the code before.

    Returns:
        `touches` between the ends of the first and the second step, and the logged `losses`.
    """
    ends: list[int] = []
    advance = Trainer.advance

    def counted(trainer: Trainer, batch: Any) -> None:
        advance(trainer, batch)
        ends.append(len(device.touches))

    device.touches.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "advance", counted)
        patch.setattr(training_run, "resolve_device", lambda *_: torch.device(device.NAME, 0))
        if plant is not None:
            plant(patch)
        trained(recipe, out)
    return {"touches": device.touches[ends[PLAIN_STEP - 2] : ends[PLAIN_STEP - 1]], "losses": losses(out)}
