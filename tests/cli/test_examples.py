"""`--help` shows examples that can be copied, and defaults that are true."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest

from ldm_cli.cli import app
from ldm_cli.cli.examples import EXAMPLES
from ldm_cli.cli.sample_arguments import _FIELDS
from ldm_cli.recipe.sample_recipe import SampleRecipe
from tests.test_readme import check_command


def commands() -> Iterator[str]:
    for name, command in app.program().commands.items():
        yield from (f"{name} {inner}".strip() for inner in getattr(command, "commands", {"": command}))


def test_every_command_has_examples_of_its_own() -> None:
    assert sorted(EXAMPLES) == sorted(commands())
    assert [line for name, lines in EXAMPLES.items() for line in lines if not f"{line} ".startswith(f"{name} ")] == []


@pytest.mark.parametrize("line", [line for lines in EXAMPLES.values() for line in lines])
def test_the_options_fields_and_recipes_of_every_example_exist(line: str) -> None:
    words = shlex.split(line)
    check_command(words[: words.index(">")] if ">" in words else words)


@pytest.mark.parametrize("command", EXAMPLES)
def test_help_has_every_example_on_a_line(
    command: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert app.run([*command.split(), "--help"]) == 0
    lines = [line.strip() for line in capfd.readouterr().out.splitlines()]
    assert {f"ldm {line}" for line in EXAMPLES[command]} - {*lines} == set()


def test_the_defaults_in_the_help_of_sample_are_those_of_its_recipe() -> None:
    texts = {parameter.name: parameter.help for parameter in app.program().commands["sample"].params}
    base = SampleRecipe(command="sample", model="x").to_mapping()
    compared = set()
    for option, field in _FIELDS.items():
        value: Any = base
        for part in field.split("."):
            value = (value or {}).get(part)
        if isinstance(value, int | float) and not isinstance(value, bool):
            compared.add(option)
            assert re.search(rf"; default: {value:g}\b", texts[option]), option
    assert compared >= {"number", "steps", "guidance", "batch_size"}


def test_every_trainer_says_where_it_writes(capfd: pytest.CaptureFixture[str]) -> None:
    assert app.run(["train-vae", "--help"]) == 0
    assert "runs/NAME" in capfd.readouterr().out
