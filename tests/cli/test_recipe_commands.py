"""`ldm recipe list | show | check | schema`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ldm_cli.cli import app
from ldm_cli.recipe.schema import RECIPES
from ldm_cli.recipe.shipped import recipes_folder, shipped_recipes


def test_list_names_command_and_purpose_of_each(capfd: pytest.CaptureFixture[str]) -> None:
    assert app.run(["recipe", "list", "--json"]) == 0
    rows = json.loads(capfd.readouterr().out)["recipes"]
    assert [row["name"] for row in rows] == list(shipped_recipes())
    assert all(row["command"] in RECIPES and row["about"] for row in rows)
    assert app.run(["recipe", "list"]) == 0
    assert "demo/clip" in capfd.readouterr().out


def test_show_prints_the_file_as_written(capfd: pytest.CaptureFixture[str]) -> None:
    assert app.run(["recipe", "show", "demo/vae"]) == 0
    assert capfd.readouterr().out == (recipes_folder() / "demo/vae.yaml").read_text(encoding="utf-8")


def test_show_resolves_defaults_and_changes(capfd: pytest.CaptureFixture[str]) -> None:
    assert app.run(["recipe", "show", "demo/vae", "train.steps=700", "--json"]) == 0
    train = json.loads(capfd.readouterr().out)["train"]
    assert (train["steps"], train["max_nonfinite"]) == (700, 10)


def test_check_reports_on_many_recipes_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text("command: sample\n")
    paths = [str(tmp_path / f"{name}.yaml") for name in ("a", "b")]
    assert app.run(["recipe", "check", "demo/vae", *paths]) == 78
    assert capfd.readouterr().err.splitlines() == [
        f"{paths[0]}:1:1: missing required key 'model'",
        f"{paths[1]}:1:1: missing required key 'model'",
        "ldm: error: 2 of 3 recipes are invalid [E-RECIPE]",
    ]
    assert app.run(["recipe", "check", *paths, "model=x"]) == 0
    assert capfd.readouterr().out == "".join(f"{path}: a valid sample recipe\n" for path in paths)


@pytest.mark.parametrize("command", RECIPES)
def test_schema_describes_every_field(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert app.run(["recipe", "schema", command]) == 0
    schema = json.loads(capfd.readouterr().out)
    assert schema["properties"]["command"]["const"] == command
    described = [schema, *schema["$defs"].values()]
    fields = [
        (part["title"], name, field)
        for part in described
        for name, field in part.get("properties", {}).items()
        if part.get("type") == "object"
    ]
    assert len(fields) > 15
    assert [(title, name) for title, name, field in fields if "description" not in field] == []
