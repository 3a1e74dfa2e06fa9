"""`ldm cascade`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ldm_cli.cli import options as given
from ldm_cli.cli.report import make_reporter
from ldm_cli.cli.show import show_result
from ldm_cli.cli.startup import importing


def command(
    recipe: given.RecipeName,
    overrides: given.Overrides = None,
    out: Annotated[Path | None, given.out("runs/NAME/model, by the recipe's name")] = None,
    overwrite: given.Overwrite = False,
    json: given.Json = False,
    debug: given.Debug = False,
) -> None:
    """Put a model that generates and models that enlarge into one folder, as a cascade."""
    changes = given.check_overrides(overrides)
    from ldm_cli.recipe.load import load_recipe

    loaded = load_recipe(recipe, changes, expected_command="cascade")
    with importing():
        from ldm_cli.recipe.cascade_recipe import CascadeRecipe
        from ldm_cli.stages import cascade

    assert isinstance(loaded.recipe, CascadeRecipe)
    show_result(cascade.run(loaded.recipe, out, make_reporter(), overwrite=overwrite), json)
