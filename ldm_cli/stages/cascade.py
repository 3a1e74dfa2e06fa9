"""`ldm cascade`: models that generate and enlarge pictures, put into one folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from ldm_cli.errors import OutputError, UsageError
from ldm_cli.families.cascade import of_models, write_stages
from ldm_cli.families.open_family import resolve_model
from ldm_cli.formats.hub import model_path
from ldm_cli.formats.pipeline_folder import INDEX_NAME
from ldm_cli.recipe.cascade_recipe import CascadeRecipe
from ldm_cli.reporting import Reporter
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.pipeline_of import pipeline_of
from ldm_cli.sampling.request import ImageRequest
from ldm_cli.storage import TEMPORARY_PREFIX, storage_errors


def run(recipe: CascadeRecipe, out: Path | None, reporter: Reporter, *, overwrite: bool = False) -> dict[str, Any]:
    """Put the models of a recipe into one folder, as links where the file system has them.

    Args:
        recipe: the models and their settings.
        out: the folder; None: as the recipe says.
        reporter: receives the progress of downloads.
        overwrite: replace a cascade that is there.

    Returns:
        `out`, `stages` (model by subfolder), and `size`, height and width of the pictures.

    Raises:
        UsageError: a stage is a single file, or cannot sample as the recipe says.
        InputNotFoundError, CheckpointError: a model is missing, or does not fit its place.
        OutputError, StorageError: `out` exists, or cannot be written.
    """
    out = out or Path("runs") / recipe.name / "model"
    if out.exists() and not (overwrite and (out / INDEX_NAME).is_file()):
        raise OutputError(f"'{out}' exists", remedy="choose another place, or give --overwrite for a model folder")
    found = [resolve_model(model_path(stage.model, (), recipe.variant, reporter)) for stage in recipe.stages]
    for folder in found:
        if not folder.is_dir():
            raise UsageError(f"'{folder}' cannot be a stage", "it is a single file", "ldm convert makes a folder of it")
    names = ["base", *(f"enlarge-{number}" for number in range(1, len(found)))]
    settings = [stage.model_dump(mode="json", exclude={"model"}, exclude_unset=True) for stage in recipe.stages]
    pipeline = pipeline_of(of_models(dict(zip(names, zip(found, settings, strict=True), strict=True))))
    pipeline.check([ImageRequest("", 0)], SamplingConfig())
    with storage_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_name(TEMPORARY_PREFIX + out.name)
        shutil.rmtree(temporary, ignore_errors=True)
        for name, folder in zip(names, found, strict=True):
            shutil.copytree(folder, temporary / name, copy_function=_linked)
        write_stages(temporary, dict(zip(names, settings, strict=True)))
        if out.exists():
            shutil.rmtree(out)
        temporary.rename(out)
    models = {name: stage.model for name, stage in zip(names, recipe.stages, strict=True)}
    return {"out": str(out), "stages": models, "size": list(pipeline.image_size(SamplingConfig()))}


def _linked(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # no links here, or too many of this file
        shutil.copyfile(source, target)
