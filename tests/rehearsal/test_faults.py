"""Faults planted into a training step are found, and where they are."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm_cli.stages.support import denoising

from . import worker as work
from .device import DeviceMixError
from .test_steps import TOUCHES, recipe_of

Plant = Callable[[pytest.MonkeyPatch], None]


def _planted(patch: pytest.MonkeyPatch, fault: Callable[[Tensor], object]) -> None:
    """Let the denoisers' loss commit a fault."""
    true_loss = denoising.diffusion_loss

    def loss(*arguments: object) -> Tensor:
        value = true_loss(*arguments)  # type: ignore[arg-type]
        fault(value)
        return value

    patch.setattr(denoising, "diffusion_loss", loss)


def reads_a_number(patch: pytest.MonkeyPatch) -> None:
    def fault(loss: Tensor) -> object:
        return loss.sum().item()

    _planted(patch, fault)


def decides_by_a_tensor(patch: pytest.MonkeyPatch) -> None:
    def fault(loss: Tensor) -> object:
        return 0 if (loss > 0).all() else 1

    _planted(patch, fault)


def selects_by_a_mask(patch: pytest.MonkeyPatch) -> None:
    def fault(loss: Tensor) -> object:
        return loss[loss > 0]

    _planted(patch, fault)


def fetches(patch: pytest.MonkeyPatch) -> None:
    def fault(loss: Tensor) -> object:
        return loss.cpu()

    _planted(patch, fault)


def sends_and_waits(patch: pytest.MonkeyPatch) -> None:
    def fault(loss: Tensor) -> object:
        return loss * torch.ones(len(loss)).to(loss.device)

    _planted(patch, fault)


def makes_a_constant_of_a_list(patch: pytest.MonkeyPatch) -> None:
    def fault(loss: Tensor) -> object:
        return loss * torch.tensor([1.0] * len(loss), device=loss.device)

    _planted(patch, fault)


def leaves_a_constant_on_the_host(patch: pytest.MonkeyPatch) -> None:
    def fault(loss: Tensor) -> object:
        return loss * torch.ones(len(loss))

    _planted(patch, fault)


@pytest.mark.parametrize(
    ("plant", "kind"),
    [
        (reads_a_number, "read"),
        (decides_by_a_tensor, "read"),
        (selects_by_a_mask, "read"),
        (fetches, "fetch, blocking"),
        (sends_and_waits, "send, blocking"),
        (makes_a_constant_of_a_list, "send, blocking"),
    ],
)
def test_a_touch_is_found(plant: Plant, kind: str, parts: Path, worker: ProcessPoolExecutor, tmp_path: Path) -> None:
    recipe = recipe_of("unet from cache", parts)
    touches = worker.submit(work.train, recipe, tmp_path / "run", plant, ends_early=True).result()["touches"]
    assert touches == [*TOUCHES, f"{kind} test_faults.py:fault"]


def test_a_constant_on_the_host_is_an_error(parts: Path, worker: ProcessPoolExecutor, tmp_path: Path) -> None:
    recipe = recipe_of("unet from cache", parts)
    with pytest.raises(DeviceMixError, match=r"CPU tensor of shape \[\(8,\)\] meets a device tensor"):
        worker.submit(work.train, recipe, tmp_path / "run", leaves_a_constant_on_the_host, True).result()
