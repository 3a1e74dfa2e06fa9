"""docs/reference/ says what the program says: its pages are written by `scripts/reference.py` and are current."""

from __future__ import annotations

import pytest

from ldm_cli.cli.app import program
from ldm_cli.errors import LdmError
from ldm_cli.recipe.schema import RECIPES
from scripts import reference


def test_the_pages_are_those_that_the_script_writes() -> None:
    assert list(reference.changed()) == [], "run: python scripts/reference.py"


def test_a_changed_page_is_noticed_and_so_is_one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = reference.pages()
    monkeypatch.setattr(reference, "pages", lambda: {**pages, "sample.md": "another text"})
    assert list(reference.changed()) == [reference.FOLDER / "sample.md"]
    monkeypatch.setattr(reference, "pages", lambda: {name: text for name, text in pages.items() if name != "eval.md"})
    assert list(reference.changed()) == [reference.FOLDER / "eval.md"]


def test_every_option_of_every_command_is_on_its_page_with_its_help() -> None:
    pages = reference.pages()
    for name, command in program().commands.items():
        text = " ".join(pages[f"{name}.md"].split())
        for subcommand in getattr(command, "commands", {"": command}).values():
            for parameter in subcommand.params:
                assert parameter.opts[0] in text or parameter.param_type_name == "argument"
                assert " ".join(reference._escaped(parameter.help).split()) in text


def test_every_field_of_every_recipe_is_listed() -> None:
    pages = reference.pages()
    for name, recipe in RECIPES.items():
        assert [field for field in recipe.model_fields if f"- `{field}` (" not in pages[f"{name}.md"]] == []
    assert "- `batch_size` (required; whole number ≥ 1, ≤ 4194304)" in pages["recipes.md"]


def test_messages_have_dots_for_what_only_a_run_knows() -> None:
    messages = reference._messages()
    usage = dict(messages["UsageError"])
    assert usage["--max-time '…' is no duration"] == "write 3h, 90m, 1:30:00 or seconds"
    assert set(messages) >= {kind.__name__ for kind in LdmError.__subclasses__() if kind.__name__ != "OutOfMemoryError"}


def test_no_line_is_longer_than_a_screen() -> None:
    lines = [line for text in reference.pages().values() for line in text.splitlines()]
    assert [line for line in lines if len(line) > reference.WIDTH and " " in line.strip().lstrip("-> ")] == []
