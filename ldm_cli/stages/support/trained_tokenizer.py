"""The tokenizer of a recipe: read, or trained from the captions."""

from __future__ import annotations

from pathlib import Path

from ldm_cli.data.loader import sequential_batches
from ldm_cli.data.tokenizer import Tokenizer
from ldm_cli.recipe.ar_recipe import TrainArRecipe
from ldm_cli.recipe.schema import TrainClipRecipe
from ldm_cli.stages.support.training_run import Workbench
from ldm_cli.training.checkpoint import commit_folder


def tokenizer_of(recipe: TrainClipRecipe | TrainArRecipe, bench: Workbench) -> Tokenizer:
    """The recipe's vocabulary, or one trained from the captions; trained once and kept in the run folder."""
    if recipe.tokenizer.path is not None:
        return Tokenizer.load(Path(recipe.tokenizer.path))
    folder = bench.run.path / "tokenizer"
    if not folder.is_dir():
        bench.run.log("training the tokenizer from the captions")
        stream = sequential_batches(
            bench.shards, recipe.data, 1024, limit=recipe.tokenizer.max_captions, with_images=False
        )
        captions = [caption for batch in stream for caption in batch.captions]
        commit_folder(folder, Tokenizer.train(captions, recipe.tokenizer).save)
    return Tokenizer.load(folder)
