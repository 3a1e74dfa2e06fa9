"""The pipeline of a recipe of pictures: of its model, with an upscaler after it, or of an upscaler alone."""

from __future__ import annotations

from pathlib import Path

from ldm_cli.errors import UsageError
from ldm_cli.families.family import Family, ImageGenerator
from ldm_cli.families.open_family import open_family
from ldm_cli.recipe.sample_recipe import SampleRecipe
from ldm_cli.sampling.picture_pipeline import PicturePipeline
from ldm_cli.sampling.pipeline_of import pipeline_of
from ldm_cli.sampling.upscale_pipeline import UpscaledPipeline, UpscalePipeline
from ldm_cli.sampling.upscaling import Upscaling


def open_pipeline(recipe: SampleRecipe, family: ImageGenerator) -> PicturePipeline:
    """What generates the pictures of a recipe.

    Args:
        recipe: names the upscaler, if there is one.
        family: the model, or the upscaler itself where there is no other.

    Raises:
        UsageError: the upscaler enlarges no pictures.
        InputNotFoundError, CheckpointError: it cannot be read.
    """
    asked = recipe.upscale
    if asked is None:
        return pipeline_of(family)
    used, sampling = family, recipe.sampling
    if recipe.model:
        compiled = sampling.compile is True
        used = open_family(Path(asked.model), family.device, sampling.precision, compiled=compiled)
    if not isinstance(used, Family) or used.low_resolution is None:
        remedy = "give a run of train-unet with low_resolution, or a published upscaler"
        raise UsageError(f"--upscale '{asked.model}' enlarges no pictures", remedy=remedy)
    if not recipe.model:
        return UpscalePipeline(used, asked.noise_level)
    weighted = recipe.weighted_words
    return UpscaledPipeline(
        pipeline_of(family), Upscaling(used, asked.sampling, asked.noise_level, asked.tile, weighted)
    )
