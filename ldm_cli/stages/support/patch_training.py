"""What the recipe of a transformer says about its patches, put to work: see `core/patch_training.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_cli import philox
from ldm_cli.core.models.clip import CLIPModel
from ldm_cli.core.models.sd3_transformer_2d_config import SD3Transformer2DConfig
from ldm_cli.core.patch_training import PatchAlignment, random_subset
from ldm_cli.core.patch_training_config import PatchTrainingConfig
from ldm_cli.data.batch import Batch
from ldm_cli.families.clip_folder import open_image_processor, outline_clip, vision_transformer
from ldm_cli.families.family import place
from ldm_cli.formats.model_folder import load_model
from ldm_cli.recipe.schema import TrainUnetRecipe
from ldm_cli.stages.support.model_sizes import count_parameters, model_at


@dataclass(frozen=True)
class PatchTraining:
    """What a step of training does with patches.

    Attributes:
        side: of a patch, in latent pixels.
        whole_from: first step at which no patch is left out.
        alignment: compares tokens with features; None: off.
    """

    config: PatchTrainingConfig
    side: int
    whole_from: int
    key: philox.Key
    alignment: PatchAlignment | None

    def given(
        self, batch: Batch, latents: Tensor, mask: Tensor | None, step: int
    ) -> tuple[dict[str, Any], Tensor | None]:
        """Further arguments of the transformer, and how much each latent pixel [B, 1, h, w] counts in the loss."""
        given: dict[str, Any] = {}
        if self.alignment is not None:
            given["tokens_after"] = self.config.aligned_block
        if self.config.left_out and step < self.whole_from:
            rows, columns = (length // self.side for length in latents.shape[-2:])
            asked = rows * columns, self.config.left_out, self.config.mixer_blocks
            given["subset"] = subset = random_subset(self.key, batch.epoch, batch.position, *asked)
            weights = subset.weights(rows, columns, self.side)
            mask = weights if mask is None else mask * weights
        return given, mask

    def added(self, loss: Tensor, tokens: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss with that of the alignment, and a figure of the latter."""
        assert self.alignment is not None
        height, width = batch.images.shape[-2:]
        rows = round((tokens.shape[1] * height / width) ** 0.5)
        aligned = self.alignment(tokens, batch.images, rows)
        return loss + self.config.alignment_weight * aligned, {"alignment": aligned.detach()}


def open_patch_training(recipe: TrainUnetRecipe, device: torch.device) -> PatchTraining | None:
    """What a recipe asks for, its CLIP on the device; None: nothing.

    Raises:
        RecipeError, InputNotFoundError, CheckpointError: the CLIP has no Vision Transformer, or cannot be read.
    """
    config, model = recipe.patches, recipe.model
    if not isinstance(model, SD3Transformer2DConfig) or not (config.left_out or config.clip):
        return None
    alignment = None
    if config.clip is not None:
        tower = vision_transformer(load_model(CLIPModel, Path(config.clip)), "patches.clip", config.clip)
        place(device, torch.float32, tower)
        alignment = PatchAlignment(tower, open_image_processor(Path(config.clip)), model.width)
    whole_from = 1 + round(config.whole_from * recipe.train.steps)
    return PatchTraining(config, model.patch_size, whole_from, philox.key(recipe.seed, "patches"), alignment)


def patch_parameters(recipe: TrainUnetRecipe, notes: list[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Parameters that are trained and used beside those of the models, by name; see `model_sizes.py`."""
    clip = None if recipe.patches.clip is None else model_at("patches.clip", recipe.patches.clip, outline_clip, notes)
    if clip is None or not isinstance(recipe.model, SD3Transformer2DConfig):
        return {}, {}
    tower = vision_transformer(clip, "patches.clip", str(recipe.patches.clip))
    with torch.device("meta"):
        alignment = PatchAlignment(tower, open_image_processor(Path(str(recipe.patches.clip))), recipe.model.width)
    return {"projection": count_parameters(alignment)}, {"patches.clip": count_parameters(tower)}
