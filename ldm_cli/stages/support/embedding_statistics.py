"""Mean and deviation of the image embeddings of the training data, measured once for a run."""

from __future__ import annotations

import torch

from ldm_cli.core.models.image_normalizer import ImageNormalizer
from ldm_cli.data.loader import Loader
from ldm_cli.data.to_device import sent_to_device
from ldm_cli.families.prior import EMBEDDINGS
from ldm_cli.formats.model_folder import load_model
from ldm_cli.formats.model_source import has_model_json
from ldm_cli.formats.pipeline_folder import IMAGE_NORMALIZER
from ldm_cli.formats.weight_files import CONFIG_NAME
from ldm_cli.recipe.train_recipe import StartedRecipe
from ldm_cli.stages.support.batch_encoder import BatchEncoder
from ldm_cli.stages.support.start import start_folder
from ldm_cli.stages.support.training_run import Workbench
from ldm_cli.training.checkpoint import problem_with


def measured_normalizer(
    recipe: StartedRecipe, bench: Workbench, encoder: BatchEncoder, num_measured: int
) -> ImageNormalizer:
    """The normalizer of the first pictures that training sees, or of the pipeline of `start_from`; on the device.

    The run's `frozen` folder keeps it, in `image_normalizer`: a run that goes on does not measure again.

    Args:
        encoder: gives embeddings among its moments.
        num_measured: most pictures; less than a part of a batch is left out at the end of a smaller data set.
    """
    known_places = [bench.run.frozen] if problem_with(bench.run.frozen) is None else []
    if recipe.start_from is not None:
        known_places.append(start_folder(recipe).parent)
    for folder in known_places:
        if has_model_json(folder / IMAGE_NORMALIZER / CONFIG_NAME):
            return load_model(ImageNormalizer, folder / IMAGE_NORMALIZER).to(bench.device)
    # As many rows as in training: the last bits of a row depend on their number.
    size, known = recipe.train.part_size(), bench.shards.num_samples
    loader = Loader(
        bench.shards, recipe.data, seed=recipe.seed, batch_size=size, with_captions=False, cache=bench.cache
    )
    batches = loader.batches(0, max(1, min(num_measured, known or num_measured) // size))
    bench.reporter.info("measuring mean and deviation of the image embeddings")
    found = [encoder.moments_of(batch)[EMBEDDINGS] for batch in sent_to_device(batches, bench.device)]
    return ImageNormalizer.measured(torch.cat(found))
