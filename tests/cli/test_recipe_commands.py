"""`ldm recipe list | show | check | fields | schema`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ldm_cli.cli import app
from ldm_cli.recipe.load import load_recipe
from ldm_cli.recipe.schema import RECIPES
from ldm_cli.recipe.shipped import recipes_folder, shipped_recipes
from ldm_cli.recipe.yaml_source import parse_yaml


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
        *(f"{path}:1:1: model is missing: name one, or upscale alone with edit.image" for path in paths),
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


@pytest.mark.parametrize("command", RECIPES)
def test_fields_are_listed_in_80_columns_with_words_for_each(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert app.run(["recipe", "fields", command]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert app.run(["recipe", "fields", command, "--json"]) == 0
    fields = json.loads(capfd.readouterr().out)["fields"]
    assert all(field["about"] and field["type"] for field in fields)
    assert {field["name"] for field in fields if "any" in field["type"]} <= {"eval.sweep"}
    assert [line.partition(":")[0] for line in lines if line[0] != " "] == [field["name"] for field in fields]
    names = {field["name"] for field in fields}
    assert names >= set(RECIPES[command].model_fields)
    assert all(name.rpartition(".")[0] in names | {""} for name in names), "a section stands before its fields"


def test_a_listed_default_is_that_of_the_recipe(capfd: pytest.CaptureFixture[str]) -> None:
    assert app.run(["recipe", "fields", "train-vae", "train", "--json"]) == 0
    fields = {field["name"]: field for field in json.loads(capfd.readouterr().out)["fields"]}
    train = load_recipe("demo/vae").recipe.train.__class__(steps=1, batch_size=1).to_mapping()
    for name, value in train.items():
        default = fields[f"train.{name}"]["default"]
        assert default == "required" or parse_yaml(default).data == value
    assert fields["train.lr"]["type"] == "number > 0"
    assert fields["train.betas"]["type"] == "2 × number ≥ 0 ≤ 1"
    assert fields["train.micro_batch"]["type"] == "integer ≥ 1 or null"


def test_fields_by_the_beginning_of_a_name_or_by_another_name(capfd: pytest.CaptureFixture[str]) -> None:
    assert app.run(["recipe", "fields", "train-unet", "lora.r"]) == 0
    assert capfd.readouterr().out.startswith("lora.rank: integer ≥ 1 ≤ 1024, default 8\n    Rank of the updates")
    assert app.run(["recipe", "fields", "train-unet", "learning_rate"]) == 2
    assert "did you mean 'train.lr'?" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["train-vae", "demo/vae", "--lr", "1e-4"], "--lr; write train.lr=VALUE, or see ldm train-vae --help"),
        (["train-unet", "demo/unet", "--train-batch-size=4"], "write train.batch_size=VALUE"),
        (["train-unet", "demo/unet", "--output_dir", "x"], "write --out, or"),
        (["train-unet", "demo/unet", "--nonsense"], "--nonsense; see ldm train-unet --help"),
    ],
)
def test_an_option_of_another_program_names_the_field(
    arguments: list[str], remedy: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert app.run(arguments) == 2
    assert remedy in capfd.readouterr().err
