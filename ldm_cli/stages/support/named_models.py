"""The models that a recipe names: fetched from the hub before a stage begins, which then knows folders alone."""

from __future__ import annotations

from typing import Any, TypeVar

from ldm_cli.config import Config, NamesModel
from ldm_cli.formats.hub import fetch, hub_name
from ldm_cli.formats.pipeline_folder import INDEX_NAME
from ldm_cli.recipe.schema import Recipe
from ldm_cli.reporting import Reporter

RecipeT = TypeVar("RecipeT", bound=Recipe)
ConfigT = TypeVar("ConfigT", bound=Config)


def with_fetched_models(recipe: RecipeT, reporter: Reporter) -> RecipeT:
    """The recipe with a folder in place of each hub name; errors as in `fetch`."""
    return _fetched(recipe, recipe.variant, reporter)


def _fetched(config: ConfigT, variant: str | None, reporter: Reporter) -> ConfigT:
    changes: dict[str, Any] = {}
    for field, info in type(config).model_fields.items():
        value = getattr(config, field)
        if isinstance(value, Config):
            inner = _fetched(value, variant, reporter)
            changes |= {field: inner} if inner is not value else {}
        for marker in info.metadata:
            if isinstance(marker, NamesModel) and value and (name := hub_name(value, reporter)):
                folder = fetch(name, marker.components, variant, reporter)
                is_component = marker.components and (folder / INDEX_NAME).is_file()
                changes[field] = str(folder / marker.components[0] if is_component else folder)
    return config.model_copy(update=changes) if changes else config
