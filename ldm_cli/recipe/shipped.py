"""The recipes that are part of the package."""

from __future__ import annotations

from pathlib import Path

from ldm_cli.config import did_you_mean
from ldm_cli.errors import InputNotFoundError

_PACKAGE = Path(__file__).resolve().parent.parent


def recipes_folder() -> Path:
    """`ldm_cli/recipes` of an installed wheel, or `recipes` at the top of a checkout."""
    installed = _PACKAGE / "recipes"
    return installed if installed.is_dir() else _PACKAGE.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Every shipped recipe by name (`demo/clip`), sorted."""
    folder = recipes_folder()
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file of a recipe: a path, or the name of a shipped recipe with or without `.yaml`.

    Raises:
        InputNotFoundError: neither exists.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    plain = name.removesuffix(".yaml").removeprefix("recipes/")
    if plain in shipped:
        return shipped[plain]
    cause, remedy = "no such file, and no shipped recipe of that name", "see ldm recipe list"
    if path.is_dir():
        cause, remedy = "is a folder", f"ldm sample takes a model as --model {name}"
    else:
        cause += did_you_mean(plain, list(shipped))
    raise InputNotFoundError(f"cannot read recipe '{name}'", cause, remedy)
