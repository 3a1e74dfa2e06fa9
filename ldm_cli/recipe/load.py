"""Load a recipe file with overrides and validate it; all problems are reported at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import ValidationError

from ldm_cli.config import Config, did_you_mean
from ldm_cli.errors import RecipeError, printable, without_secrets
from ldm_cli.inputs import read_input
from ldm_cli.recipe.every_problem import every_problem
from ldm_cli.recipe.overrides import Draft, apply_override
from ldm_cli.recipe.problems import describe, line_of
from ldm_cli.recipe.schema import RECIPES, Recipe
from ldm_cli.recipe.shipped import find_recipe
from ldm_cli.recipe.yaml_source import YamlSource, parse_yaml

Section = TypeVar("Section", bound=Config)


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe and its text."""

    recipe: Recipe
    text: str
    """The file as written."""


def load_recipe(
    name: str | Path | None,
    overrides: Sequence[str] = (),
    expected_command: str | None = None,
    options: Sequence[tuple[str, str, Any]] = (),
    base: Mapping[str, Any] | None = None,
) -> LoadedRecipe:
    """Read, change and validate a recipe. Nothing is created, and only the recipe is opened.

    Args:
        name: a file, a shipped recipe such as `demo/clip`, or None for a recipe of options alone.
        overrides: `key=value` arguments, applied in order.
        expected_command: the command being run; the recipe must be for it.
        options: options that set fields, applied last: `("--steps", "sampling.steps", 20)`.
        base: the initial content of a recipe without a file, as plain data.

    Raises:
        InputNotFoundError: there is no such recipe, or it cannot be read.
        RecipeError: with every problem as one line `file:line:col: path: …` in `problems`.
    """
    path = None if name is None else find_recipe(str(name))
    text, draft = _read(path, expected_command, base or {})
    _apply(draft, overrides, options)
    shown = str(path) if path else "the command line"
    if not isinstance(draft.data, dict):
        raise _invalid(shown, draft.problems)
    recipe = _validated(_recipe_class(draft, expected_command, shown), draft, shown)
    return LoadedRecipe(cast(Recipe, recipe), text)


def load_section(model: type[Section], overrides: Sequence[str], options: Sequence[tuple[str, str, Any]]) -> Section:
    """Load one section of a recipe from the command line alone, by the rules of `load_recipe`.

    Raises:
        RecipeError: with every problem in `problems`.
    """
    draft = Draft({}, values={(): "the command line"})
    _apply(draft, overrides, options)
    return _validated(model, draft, "the command line")


def _apply(draft: Draft, overrides: Sequence[str], options: Sequence[tuple[str, str, Any]]) -> None:
    for override in overrides:
        apply_override(draft, override)
    for option, key, value in options:
        draft.assign(tuple(key.split(".")), YamlSource(data=value), f"option '{option}'")


def _validated(model: type[Section], draft: Draft, shown: str) -> Section:
    try:
        valid = model.from_mapping(draft.data)
    except ValidationError as error:
        raise _invalid(shown, [*draft.problems, *_located(error, model, draft)]) from None
    if draft.problems:
        raise _invalid(shown, draft.problems)
    return valid


def _read(path: Path | None, command: str | None, base: Mapping[str, Any]) -> tuple[str, Draft]:
    if path is None:
        return "", Draft({"command": command, **base}, values={(): "the command line"})
    raw = read_input(path, too_large=RecipeError)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, column = raw.count(b"\n", 0, error.start) + 1, error.start - raw.rfind(b"\n", 0, error.start)
        problem = f"{path}:{line}:{column}: expected UTF-8 text, found byte 0x{raw[error.start]:02x}"
        raise _invalid(str(path), [problem]) from None
    draft = Draft.from_source(parse_yaml(text), str(path))
    if not draft.problems and not isinstance(draft.data, dict):
        draft.problems.append(f"{path}:1:1: expected a mapping of keys to values, found {describe(draft.data)}")
    return text, draft


def _recipe_class(draft: Draft, expected: str | None, shown: str) -> type[Config]:
    """The recipe's class by its `command`."""
    command = draft.data.get("command")
    place = draft.place(("command",), at_key=False) or f"{shown}:1:1"
    if command is None and expected is None:
        near = next((f" (is it '{key}'?)" for key in draft.data if did_you_mean(str(key), ["command"])), "")
        missing = f"{place}: missing required key 'command'{near}; one of {', '.join(RECIPES)}"
        raise _invalid(shown, [*draft.problems, missing])
    if command is None or command == expected:
        return RECIPES[expected or command]
    if not isinstance(command, str) or command not in RECIPES:
        hint = did_you_mean(str(command), list(RECIPES))
        unknown = f"{place}: command: found {describe(command)}{hint}, expected one of {', '.join(RECIPES)}"
        raise _invalid(shown, [*draft.problems, unknown])
    if expected is None:
        return RECIPES[command]
    raise _invalid(shown, [f"{place}: command: this is a {command} recipe; run: ldm {command} {shown}"])


def _located(error: ValidationError, model: type[Config], draft: Draft) -> list[str]:
    problems = every_problem(error, model, draft.data, draft.quoted)
    order = {path: number for number, path in enumerate(draft.keys)}
    problems.sort(key=lambda problem: order.get(problem.path, -1))
    known = {problem.partition(": ")[0] for problem in draft.problems}
    placed = [(draft.place(p.path, p.at_key), line_of(p.path, p.message)) for p in problems]
    return [f"{place}: {line}" for place, line in placed if place not in known]


def _invalid(shown: str, problems: list[str]) -> RecipeError:
    count = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
    safe = tuple(printable(without_secrets(problem)) for problem in problems)
    return RecipeError(f"recipe '{shown}' is invalid", count, problems=safe)
