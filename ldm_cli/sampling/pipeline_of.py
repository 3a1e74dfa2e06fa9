"""The pipeline of a model, by its kind."""

from __future__ import annotations

from ldm_cli.families.autoregressive import Autoregressive
from ldm_cli.families.cascade import Cascade
from ldm_cli.families.family import Family, ImageGenerator
from ldm_cli.sampling.cascade_pipeline import CascadePipeline
from ldm_cli.sampling.picture_pipeline import PicturePipeline
from ldm_cli.sampling.pipeline import Pipeline
from ldm_cli.sampling.token_pipeline import TokenPipeline
from ldm_cli.sampling.upscale_pipeline import UpscalePipeline


def pipeline_of(generator: ImageGenerator) -> PicturePipeline:
    """What generates pictures with a model.

    Raises:
        TypeError: a kind of model that has no pipeline.
    """
    if isinstance(generator, Autoregressive):
        return TokenPipeline(generator)
    if isinstance(generator, Family) and generator.low_resolution is not None:
        return UpscalePipeline(generator)
    if isinstance(generator, Cascade):
        return CascadePipeline(generator)
    if isinstance(generator, Family):
        return Pipeline(generator)
    raise TypeError(f"pipeline_of a {type(generator).__name__}")
