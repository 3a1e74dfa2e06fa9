"""The pictures of an evaluation, kept in folders as `ldm sample` makes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ldm_cli.pictures.job import Item
from ldm_cli.pictures.job_folder import JobFolder
from ldm_cli.pictures.writer import Write
from ldm_cli.recipe.sample_recipe import SampleRecipe
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.edit_config import EditConfig
from ldm_cli.sampling.picture_pipeline import PicturePipeline
from ldm_cli.sampling.request import ImageRequest
from ldm_cli.sampling.sample_options import PLAIN
from ldm_cli.stages.support.job_adapters import JobAdapters
from ldm_cli.stages.support.picture_generator import PictureGenerator
from ldm_cli.training.ranks import Ranks


def kept_pictures(
    path: Path,
    pipeline: PicturePipeline,
    sampling: SamplingConfig,
    captions: Sequence[str],
    ranks: Ranks,
    warn: Callable[[str], None],
) -> Write:
    """A function that writes a picture by its index; picture i has caption i and seed `sampling.seed + i`.

    Args:
        path: the folder. It is made, with images.json, by the first rank.
        pipeline, sampling: with which the pictures are generated.
        ranks: all of them call.
        warn: receives a message for each damaged picture.

    Raises:
        OutputError, StorageError: as of `JobFolder.claim`.
    """
    folder = str(pipeline.family.folder)
    recipe = SampleRecipe(command="sample", model=folder, sampling=sampling, weighted_words=PLAIN.weighted)
    generator = PictureGenerator(pipeline, recipe, None, len(captions), JobAdapters(pipeline.family, [], {}, ()))
    requests = [ImageRequest(caption, sampling.seed + i) for i, caption in enumerate(captions)]
    images = [generator.provenance(Item(request, sampling, EditConfig()), i) for i, request in enumerate(requests)]
    job = JobFolder(path, generator.shared, images, generator.sources)
    if ranks.is_first:
        job.make()
        job.claim(overwrite=False, warn=warn)
    ranks.wait()
    return lambda index, pixels: job.add(pixels, index)
