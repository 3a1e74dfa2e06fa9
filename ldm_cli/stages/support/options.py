"""What the command line says to every stage, beside the recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from ldm_cli.core.compiling import should_compile
from ldm_cli.core.precision import precision_on
from ldm_cli.errors import UnavailableError, UsageError
from ldm_cli.recipe.train_recipe import TrainRecipe
from ldm_cli.sampling.config import SamplingConfig


@dataclass(frozen=True)
class RunOptions:
    """Where to write, on what to compute, how to treat an earlier run: nothing that changes the results."""

    out: Path | None = None
    """Output folder; None: the recipe's own (`runs/NAME`, `samples`)."""
    device: str = "auto"
    """`auto`, `cpu`, or `cuda` (optionally `cuda:1`)."""
    resume: str = "auto"
    """`auto` continues the run found in `out`, `never` refuses to, all else is a checkpoint to start at."""
    max_time: float | None = None
    """Seconds after which the run saves and stops; None: no limit."""
    data_trace: Path | None = None
    """File that tells which samples each step took; None: none."""
    recipe_text: str = ""
    """The recipe as written, kept beside the results."""
    overwrite: bool = False
    """Replace existing output files."""


TrainRecipeT = TypeVar("TrainRecipeT", bound=TrainRecipe)


def with_precision(recipe: TrainRecipeT, options: RunOptions) -> TrainRecipeT:
    """The recipe with the precision that `train.precision: null` stands for on the device of a run.

    Raises:
        UsageError, UnavailableError: as in `resolve_device`.
    """
    precision = precision_on(resolve_device(options.device), recipe.train.precision)
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"precision": precision})})


_WORTH_COMPILING = 500
"""Pictures of a job from which on compiling, which takes a minute or more, is expected to pay off."""


def settled(
    sampling: SamplingConfig, num_pictures: int, device: torch.device, tell: Callable[[str], None]
) -> SamplingConfig:
    """The settings with what `compile: auto` and `precision: null` stand for on this machine, in a job of this size.

    Args:
        sampling: as in the recipe.
        tell: receives a line if models are compiled, or cannot be.
    """
    compiled = should_compile(sampling.compile, device, num_pictures >= _WORTH_COMPILING, tell)
    return sampling.model_copy(update={"compile": compiled, "precision": precision_on(device, sampling.precision)})


def resolve_device(device: str, local_rank: int = 0) -> torch.device:
    """The device that `--device` names; `auto` is CUDA where there is one, which then multiplies float32 in TF32.

    Args:
        local_rank: number of this process among those on this machine; each takes its own CUDA device.

    Raises:
        UsageError: `device` is no name of a device.
        UnavailableError: the device is missing on this machine.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError:
        resolved = None
    if resolved is None or resolved.type not in ("cpu", "cuda"):
        raise UsageError(f"unknown device '{device}'", remedy="--device takes auto, cpu or cuda")
    if resolved == torch.device("cuda") and local_rank:  # no index given
        resolved = torch.device("cuda", local_rank)
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        build = "this build of torch has no CUDA" if torch.version.cuda is None else "torch sees no such device"
        raise UnavailableError(f"device '{resolved}' is missing", build, "use --device cpu, or install torch with CUDA")
    if resolved.type == "cuda":
        torch.set_float32_matmul_precision("high")
    return resolved
