"""The text-encoder study: its commands, its rule, and what it publishes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import study
from ldm_cli.recipe.load import load_recipe
from ldm_cli.recipe.schema import TrainUnetRecipe


def of_seed(distances: dict[str, float]) -> dict[str, dict[float, dict[str, float]]]:
    """Models whose distance is lower at scale 2 than at 1, and whose other numbers are all equal."""
    return {
        model: {
            1: {"distance": distance + 1, "clip_score": 20.0, "accuracy": 0.5},
            2: {"distance": distance, "clip_score": 20.0, "accuracy": 0.5},
        }
        for model, distance in distances.items()
    }


SMALL_TOWER, CENTRE, LARGE_TOWER = study.AXES["text encoder"].values()
SMALL_UNET, _, LARGE_UNET = study.AXES["U-Net"].values()
ENCODER_HELPS = [
    of_seed({SMALL_TOWER: 9 + k, CENTRE: 7, LARGE_TOWER: 5, SMALL_UNET: 8, LARGE_UNET: 7}) for k in (0.0, 0.1, 0.2)
]


def test_the_plan_takes_less_than_two_hours_and_every_command_of_it_has_a_recipe(tmp_path: Path) -> None:
    steps = list(study.parts(tmp_path, study.WHOLE))
    assert sum(study.MINUTES[step.kind] for step in steps) < 120
    for step in steps:
        if step.kind != "data":
            command, recipe, *rest = step.arguments
            load_recipe(
                recipe, rest[: rest.index("--out")], expected_command=None if command == "precompute" else command
            )


def test_every_unet_sees_the_same_images_and_its_own_tower(tmp_path: Path) -> None:
    recipes = []
    for step in study.parts(tmp_path, study.WHOLE):
        if step.arguments[0] == "train-unet":
            recipe = load_recipe("demo/unet", step.arguments[2 : step.arguments.index("--out")]).recipe
            assert isinstance(recipe, TrainUnetRecipe)
            recipes.append(recipe)
    assert len(recipes) == 5 * study.WHOLE.seeds
    assert len({(recipe.train, recipe.vae, recipe.data) for recipe in recipes}) == 1
    for recipe in recipes:
        width = study.TOWERS[Path(recipe.text_encoder).parent.name.removeprefix("clip-")]
        assert recipe.model.cross_attention_dim == width
        assert f"seed-{recipe.seed}" in recipe.text_encoder


def test_a_gain_is_the_best_number_of_the_largest_less_that_of_the_smallest() -> None:
    assert study.gains(ENCODER_HELPS, "text encoder", "distance") == pytest.approx([4.0, 4.1, 4.2])
    assert study.gains(ENCODER_HELPS, "U-Net", "distance") == [1.0, 1.0, 1.0]
    assert study.gains(ENCODER_HELPS, "U-Net", "clip_score") == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("differences", "found"),
    [
        ([3.0, 3.1, 3.2], "confirmed"),
        ([-3.0, -3.1, -3.2], "refuted"),
        ([3.0, 0.1, -0.2], "undecided"),
        ([3.0], "undecided"),
    ],
)
def test_the_claim_is_decided_where_the_interval_excludes_zero(differences: list[float], found: str) -> None:
    assert study.conclusion(differences) == found


def test_the_interval_is_students() -> None:
    # Mean 2, standard deviation 1, three values: 2 ± 4.303 / √3.
    assert study.interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 2.4844, 2 + 2.4844), abs=1e-4)


def test_table_and_plates_replace_what_stands_between_the_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "num_parameters", lambda _: 1234)
    extent = study.Extent(3, (1, 2), 1, {}, ())
    (tmp_path / "docs/pictures").mkdir(parents=True)
    page = tmp_path / "docs/study.md"
    page.write_text("before\n<!-- study-numbers -->\nold\n<!-- /study-numbers -->\nafter\n")
    text = study.table(tmp_path, ENCODER_HELPS, extent)
    plates = study.save_plates(tmp_path, ENCODER_HELPS, extent)
    study.publish(text, plates, tmp_path / "docs")
    study.publish(text, plates, tmp_path / "docs")
    published = page.read_text()
    assert published.startswith("before\n<!-- study-numbers -->\n|")
    assert published.endswith("<!-- /study-numbers -->\nafter\n")
    assert "old" not in published
    assert "| Fréchet distance | 4.10 ± 0.10 | 1.00 ± 0.00 | 3.1 (2.9 to 3.3) | confirmed |" in published
    names = {plate.name for plate in plates}
    assert names == {f"study-{axis}.{kind}" for axis in ("text-encoder", "u-net") for kind in ("png", "svg")}
    assert names == {file.name for file in (tmp_path / "docs/pictures").iterdir()}


@pytest.mark.exhaustive
def test_every_command_runs_and_a_second_run_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["study.py", "--smoke", "--out", str(tmp_path)])

    def results() -> dict[str, Any]:
        study.main()
        return {str(path): path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} | {
            "text": (tmp_path / "study.md").read_text()
        }

    assert results() == results()
