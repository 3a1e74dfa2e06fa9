"""`ldm recipe list | show | check | fields | schema`."""

from __future__ import annotations

import functools
import json as json_format
import operator
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from ldm_cli.cli import options as given
from ldm_cli.cli.examples import epilog
from ldm_cli.cli.show import show_result
from ldm_cli.cli.streams import is_utf8, write_line, write_result
from ldm_cli.errors import InputNotFoundError, RecipeError, UsageError

commands = typer.Typer(help="List, show and check recipes.", no_args_is_help=False)


@commands.command("list", epilog=epilog("recipe list"))
def list_recipes(json: given.Json = False, debug: given.Debug = False) -> None:
    """List the shipped recipes."""
    from ldm_cli.recipe.shipped import shipped_recipes
    from ldm_cli.recipe.yaml_source import parse_yaml

    rows = []
    for name, path in shipped_recipes().items():
        text = path.read_text(encoding="utf-8")
        about = text.partition("\n")[0].lstrip("# ") if text.startswith("#") else ""
        rows.append({"name": name, "command": parse_yaml(text).data["command"], "about": about})
    show_result({"recipes": rows}, json)


@commands.command("show", epilog=epilog("recipe show"))
def show_recipe(
    recipe: given.RecipeName,
    overrides: given.Overrides = None,
    resolved: Annotated[bool, typer.Option("--resolved", help="Every field, defaults and changes included.")] = False,
    json: given.Json = False,
    debug: given.Debug = False,
) -> None:
    """Print a recipe as written, or with every field and its value."""
    changes = given.check_overrides(overrides)
    if not (resolved or json or changes):
        from ldm_cli.inputs import read_input
        from ldm_cli.recipe.shipped import find_recipe

        write_result(read_input(find_recipe(recipe)).decode("utf-8", "replace"))
        return
    from ldm_cli.recipe.load import load_recipe
    from ldm_cli.recipe.yaml_source import to_yaml

    mapping = load_recipe(recipe, changes).recipe.to_mapping()
    if json:
        show_result(mapping, as_json=True)
    else:
        write_result(to_yaml(mapping, ascii_only=not is_utf8()))


@commands.command("check", epilog=epilog("recipe check"))
def check_recipes(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE|KEY=VALUE", help="Recipes, and changes to all of them."),
    ],
    json: given.Json = False,
    debug: given.Debug = False,
) -> None:
    """Check recipes without running them; every problem is listed with file, line and column."""
    names = [argument for argument in arguments if "=" not in argument or Path(argument).is_file()]
    changes = tuple(argument for argument in arguments if argument not in names)
    if not names:
        raise UsageError("no recipe given", remedy="see ldm recipe check --help")
    from ldm_cli.recipe.load import load_recipe

    commands_of: dict[str, str] = {}
    errors: list[RecipeError | InputNotFoundError] = []
    for name in names:
        try:
            commands_of[name] = load_recipe(name, changes).recipe.command
        except (RecipeError, InputNotFoundError) as error:
            errors.append(error)
    if len(errors) == 1 and len(names) == 1:
        raise errors[0]
    for failure in errors:
        for line in getattr(failure, "problems", ()) or (str(failure),):
            write_line(line)
    if errors:
        raise RecipeError(f"{len(errors)} of {len(names)} recipes are invalid")
    if json:
        show_result({"recipes": commands_of}, as_json=True)
    else:
        write_result("".join(f"{name}: a valid {command} recipe\n" for name, command in commands_of.items()))


@commands.command("fields", epilog=epilog("recipe fields"))
def list_fields(
    command: Annotated[str, typer.Argument(metavar="COMMAND", help="train-clip, train-vae, ...", show_default=False)],
    prefix: Annotated[str, typer.Argument(metavar="[PREFIX]", help="A section or field: train, data.fil")] = "",
    json: given.Json = False,
    debug: given.Debug = False,
) -> None:
    """Print the fields of a recipe: name, type, default and a line of words each."""
    from ldm_cli.recipe.fields import field_lines
    from ldm_cli.recipe.other_names import field_called

    recipe = _recipe_for(command)
    lines = field_lines(recipe, prefix)
    if not lines:
        meant = field_called(prefix, recipe)
        cause = f"did you mean '{meant}'?" if meant else ""
        raise UsageError(f"no field of {command} begins with '{prefix}'", cause, f"see ldm recipe fields {command}")
    if json:
        show_result({"fields": [line._asdict() for line in lines]}, as_json=True)
        return
    for line in lines:
        default = f", default {line.default}" if line.default not in ("", "required") else f" {line.default}".rstrip()
        text = f"{line.name}: {line.type}{default}"
        head = textwrap.fill(text, 80, subsequent_indent=" " * 8, break_long_words=False, break_on_hyphens=False)
        write_result(f"{head}\n    {textwrap.shorten(line.about, 76, placeholder=' ...')}\n")


@commands.command("schema", epilog=epilog("recipe schema"))
def show_schema(
    command: Annotated[
        str | None, typer.Argument(metavar="[COMMAND]", help="train-clip, train-vae, ...; default: all.")
    ] = None,
    debug: given.Debug = False,
) -> None:
    """Print the JSON schema of recipes, for editors and validators."""
    from pydantic import TypeAdapter

    from ldm_cli.recipe.schema import RECIPES

    kinds: Any = _recipe_for(command) if command else functools.reduce(operator.or_, RECIPES.values())
    schema = TypeAdapter(kinds).json_schema()
    write_result(json_format.dumps(schema, indent=2) + "\n")


def _recipe_for(command: str) -> Any:
    """The class of a command's recipes.

    Raises:
        UsageError: there is none.
    """
    from ldm_cli.config import did_you_mean
    from ldm_cli.recipe.schema import RECIPES

    if command not in RECIPES:
        hint = did_you_mean(command, list(RECIPES)) or f"one of {', '.join(RECIPES)}"
        raise UsageError(f"no recipe is for the command '{command}'", hint.strip(" ()"))
    return RECIPES[command]
