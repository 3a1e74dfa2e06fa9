"""The models that a recipe names: found, or fetched from the hub, before a stage begins; it then knows paths alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from ldm_cli.config import Config, NamesModel
from ldm_cli.formats.hub import model_path
from ldm_cli.formats.model_source import has_model_json
from ldm_cli.formats.pipeline_folder import INDEX_NAME
from ldm_cli.recipe.eval_section import EvalSection
from ldm_cli.recipe.schema import Recipe
from ldm_cli.reporting import Reporter
from ldm_cli.stages.support.eval_models import needed_models

RecipeT = TypeVar("RecipeT", bound=Recipe)
ConfigT = TypeVar("ConfigT", bound=Config)


def with_model_folders(recipe: RecipeT, reporter: Reporter) -> RecipeT:
    """The recipe with a folder in place of each hub name, and of a pipeline where a part of one is meant.

    Errors are those of `fetch`.
    """
    return _with_folders(recipe, recipe.variant, reporter)


def _with_folders(config: ConfigT, variant: str | None, reporter: Reporter) -> ConfigT:
    changes: dict[str, Any] = {}
    unused = set(EvalSection.model_fields) - needed_models(config).keys() if isinstance(config, EvalSection) else set()
    for field, info in type(config).model_fields.items():
        value = getattr(config, field)
        if isinstance(value, Config):
            inner = _with_folders(value, variant, reporter)
            changes |= {field: inner} if inner is not value else {}
        for marker in info.metadata:
            if not isinstance(marker, NamesModel) or not value or field in unused:
                continue
            if isinstance(value, dict):
                found: Any = {name: _folder(one, marker, variant, reporter) for name, one in value.items()}
            else:
                found = _folder(value, marker, variant, reporter)
            changes |= {} if found == value else {field: found}
    return config.model_copy(update=changes) if changes else config


def _folder(value: str, marker: NamesModel, variant: str | None, reporter: Reporter) -> str:
    folder = model_path(value, marker.components, variant, reporter)
    if marker.components and has_model_json(folder / INDEX_NAME):
        folder = folder / marker.components[0]
    return value if folder == Path(value) else str(folder)
