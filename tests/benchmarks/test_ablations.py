"""The study of ways to train: its commands, what it compares, and its table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ablations
from ldm_cli.recipe.load import load_recipe
from ldm_cli.recipe.schema import TrainUnetRecipe


def loaded(part: ablations.Part) -> Any:
    command, recipe, *rest = part.arguments
    changes = rest[: rest.index("--out" if "--out" in rest else "--nproc")]
    expected = None if command == "precompute" else command
    return load_recipe(recipe, changes, expected_command=expected).recipe


def test_the_plan_takes_an_hour_and_every_command_of_it_has_a_recipe(tmp_path: Path) -> None:
    steps = list(ablations.parts(tmp_path, ablations.WHOLE))
    assert sum(ablations.MINUTES[step.kind] for step in steps) <= 60
    for step in steps:
        if step.kind != "data":
            loaded(step)


def test_a_variant_differs_from_the_plain_one_in_one_thing(tmp_path: Path) -> None:
    steps = [step for step in ablations.parts(tmp_path, ablations.WHOLE) if step.kind == "train-unet"]
    found: dict[str, list[TrainUnetRecipe]] = {}
    for step in steps:
        found.setdefault(step.variant, []).append(loaded(step))
    assert {len({recipe.seed for recipe in recipes}) for recipes in found.values()} == {ablations.WHOLE.seeds}
    plain = found.pop(ablations.PLAIN)[0].to_mapping()
    del found["U-Net, min-SNR"]
    for variant, recipes in found.items():
        own = recipes[0].to_mapping()
        changed = {name for name in plain if plain[name] != own[name]}
        assert len(changed - ({"cache"} if variant == "REPA" else set())) == 1


def test_every_variant_gets_the_steps_that_its_processor_seconds_pay_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent = {4: iter([12.0, 11.0]), 24: iter([21.0, 25.0])}
    asked: list[int] = []

    def ldm(*arguments: str) -> float:
        asked.append(next(int(a.partition("=")[2]) for a in arguments if a.startswith("train.steps=")))
        (tmp_path / "calibration").mkdir(exist_ok=True)
        return next(spent[asked[-1]])

    monkeypatch.setattr(ablations, "_ldm", ldm)
    part = ablations.Part("calibration", ("train-unet", "sd3/demo"), "AdamW")
    ablations.calibrate(part, tmp_path)
    ablations.calibrate(part, tmp_path)
    assert asked == [4, 4, 24, 24]
    # Half a second for each step.
    assert ablations.num_steps(tmp_path, "AdamW", ablations.WHOLE) == 2 * ablations.SECONDS
    assert ablations.num_steps(tmp_path, "AdamW", ablations.SMOKE) == 2


def of_seed(distances: dict[str, float]) -> dict[str, dict[str, float]]:
    levels = {f"level{i}": 0.5 for i in range(5)}
    return {name: {**levels, "distance": distance, "accuracy": 75.0} for name, distance in distances.items()}


def test_the_table_replaces_what_stands_between_the_marks_and_says_what_does_not_help(tmp_path: Path) -> None:
    seeds = [
        of_seed({ablations.PLAIN: 8.0 + k, "AdamW": 5.0 + k, "REPA": 9.0 + k, "U-Net, min-SNR": 8.5})
        for k in (0.0, 1.0)
    ]
    steps = dict.fromkeys(seeds[0], 0.5)
    (tmp_path / "calibration.json").write_text(json.dumps(steps))
    text = ablations.table(tmp_path, seeds, ablations.WHOLE)
    page = tmp_path / "ablations.md"
    page.write_text("before\n<!-- ablations-numbers -->\nold\n<!-- /ablations-numbers -->\nafter\n")
    for _ in range(2):
        ablations.publish(text, tmp_path)
    published = page.read_text()
    assert published.startswith("before\n<!-- ablations-numbers -->\n| variant |")
    assert published.endswith("<!-- /ablations-numbers -->\nafter\n")
    assert "old" not in published
    assert "| U-Net, min-SNR | 430 | 8.5 ± 0.0 | 75.0 ± 0.0 |" in published
    assert "| AdamW | 500 ± 0 | 500 ± 0 | 500 ± 0 | 500 ± 0 | 500 ± 0 |" in published
    assert max(map(len, published.splitlines())) <= 80
    assert (
        f"Fréchet distance: better than {ablations.PLAIN} with every seed: AdamW. Worse with every seed: REPA."
        in text.replace("\n  ", " ")
    )


@pytest.mark.exhaustive
def test_every_command_runs_and_a_second_run_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ablations.py", "--smoke", "--out", str(tmp_path)])

    def results() -> dict[str, Any]:
        ablations.main()
        return {str(path): path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} | {
            "text": (tmp_path / "ablations.md").read_text()
        }

    assert results() == results()
