"""The study of growth: what it varies, and what it computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from benchmarks import growth
from benchmarks.growth import Axis, Work
from ldm_cli.bench import stages
from ldm_cli.bench.race import Contender, Lap
from ldm_cli.bench.workload import size_of

_SIZES: dict[tuple[str, int], tuple[int, int]] = {}


def counted_once(recipe: Any, context_length: int) -> tuple[int, int]:
    """`size_of`, which takes a second."""
    key = repr(recipe.model), context_length
    if key not in _SIZES:
        _SIZES[key] = size_of(recipe, context_length)
    return _SIZES[key]


def steps_that_take_a_second_a_gflop(contenders: Sequence[Contender], **_: Any) -> dict[str, list[Lap]]:
    """Stands in for a race: operations are counted, and nothing is run."""
    results = {}
    for contender in contenders:
        recipe, _, context_length = contender.arguments
        seconds = stages.STEPS * recipe.train.batch_size * counted_once(recipe, context_length)[1] / 1e9
        results[contender.name] = [Lap(1, seconds, stages.STEPS * 2.0, 0)]
    return results


def test_an_exponent_is_that_of_the_power_law() -> None:
    assert growth.exponent([1.0, 2.0, 4.0], [3.0, 12.0, 48.0]) == pytest.approx(2.0)


def test_growth_is_reported_over_size_and_over_counted_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "race", steps_that_take_a_second_a_gflop)
    monkeypatch.setattr(growth, "size_of", counted_once)
    axes = (
        Axis("batch", (1, 2, 4), lambda n: [f"train.batch_size={n}"]),
        Axis("text tokens", (4, 256), lambda _: [], tokens=int),
        Axis("parameters", (32, 64), lambda w: [f"unet.block_out_channels=[{w},{w}]"]),
    )
    small = (
        "train.batch_size=1",
        "unet.sample_size=8",
        "unet.block_out_channels=[32,32]",
        "unet.down_block_types=[CrossAttnDownBlock2D,DownBlock2D]",
        "unet.up_block_types=[UpBlock2D,CrossAttnUpBlock2D]",
    )
    batch, tokens, parameters = growth.growth(1, "cpu", {"train-unet": Work("bench/unet", small, axes)})
    assert (batch["work"], batch["against"], batch["points"]) == ("train-unet", "batch", [1, 2, 4])
    assert batch["step_ms"] == pytest.approx([1e3 * value for value in batch["gflop"]], rel=0.1)
    assert batch["exponent"] == pytest.approx(1.0)
    assert batch["cpu_exponent"] == 0.0
    for row in (batch, tokens, parameters):
        assert row["exponent"] == pytest.approx(row["gflop_exponent"])
        assert row["exponent_by_gflop"] == pytest.approx(1.0)
    assert 0.0 < tokens["exponent"] < batch["exponent"]
    assert tokens["points"] == [4, 256]
    assert parameters["points"][1] > 2 * parameters["points"][0] > 1e5


@pytest.mark.parametrize("name", growth.WORKS)
def test_every_point_of_every_series_is_a_recipe(name: str) -> None:
    work = growth.WORKS[name]
    for axis in work.axes:
        assert len(axis.values) >= 4
        recipes = [(growth._recipe(work, axis, value), axis.tokens(value)) for value in axis.values]
        assert len(set(map(repr, recipes))) == len(recipes)
