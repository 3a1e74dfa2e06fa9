"""How a U-Net's training step grows with what is asked of it, and whether long runs keep their size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ldm_cli.bench.race import Contender, race, resident_bytes
from ldm_cli.bench.workload import Workload, our_step
from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig
from ldm_cli.recipe.load import load_recipe
from ldm_cli.recipe.schema import TrainUnetRecipe

_SERIES: dict[str, tuple[int, ...]] = {
    "batch": (4, 8, 16, 32),
    "tokens": (32, 77, 154, 308),
    "resolution": (8, 16, 32),
    "parameters": (32, 64, 96),
}


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """p of the power law y ∝ x^p by least squares in logarithms: 1 is proportional, 0 does not grow."""
    if len(x) != len(y) or len(x) < 2:
        raise ValueError(f"{len(x)} abscissas and {len(y)} ordinates; at least 2 of each are needed")
    logs = [(math.log(a), math.log(b)) for a, b in zip(x, y, strict=True)]
    mean_x, mean_y = (sum(pair[i] for pair in logs) / len(logs) for i in (0, 1))
    return sum((a - mean_x) * (b - mean_y) for a, b in logs) / sum((a - mean_x) ** 2 for a, _ in logs)


def growth(rounds: int, device: str) -> list[dict[str, Any]]:
    """One row per series: its points, seconds a step at each, and the exponent of their growth.

    Points of a series take turns, so that a disturbance falls on all of them.
    """
    rows = []
    for name, values in _SERIES.items():
        field = [Contender(str(value), our_step, (_workload(name, value, device),)) for value in values]
        laps = race(field, rounds=rounds, device=device)
        seconds = [lap.median for lap in laps.values()]
        points: list[float] = list(values)
        if name == "parameters":
            points = [lap.facts["parameters"] for lap in laps.values()]
        elif name == "resolution":
            points = [value**2 for value in values]
        rows.append(
            {
                "against": "latent_pixels" if name == "resolution" else name,
                "points": points,
                "step_ms": [round(1e3 * value, 2) for value in seconds],
                "exponent": exponent(points, seconds),
            }
        )
    return rows


def _workload(series: str, value: int, device: str) -> Workload:
    recipe = load_recipe("bench/unet").recipe
    assert isinstance(recipe, TrainUnetRecipe)
    unet, train, tokens = recipe.unet, recipe.train, 77
    if series == "batch":
        train = train.model_copy(update={"batch_size": value})
    elif series == "tokens":
        tokens = value
    elif series == "resolution":
        unet = unet.model_copy(update={"sample_size": value})
    else:
        unet = UNet2DConditionConfig.from_mapping(
            unet.to_mapping() | {"block_out_channels": [value, 2 * value, 4 * value]}
        )
    return Workload(recipe.model_copy(update={"unet": unet, "train": train}), device, tokens)


def memory(steps: int, device: str) -> dict[str, Any]:
    """Resident memory over a long run of a small U-Net, read at ten times.

    Returns:
        `steps`, `resident_mib` at each tenth after the first, and `growth_mib` from the first reading to the last.
    """
    recipe = load_recipe(
        "bench/unet", ["unet.block_out_channels=[32,32,32]", "unet.sample_size=8", "train.batch_size=2"]
    ).recipe
    assert isinstance(recipe, TrainUnetRecipe)
    runner = our_step(Workload(recipe, device, 8))
    readings = []
    for _ in range(10):
        for _ in range(max(1, steps // 10)):
            runner.step()
        readings.append(resident_bytes() / 2**20)
    return {"steps": steps, "resident_mib": [round(r, 1) for r in readings], "growth_mib": readings[-1] - readings[0]}
