"""The image embeddings that unCLIP's decoder is trained with, beside the text: noised, and dropped at times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ldm_cli import philox
from ldm_cli.core.condition import Condition
from ldm_cli.core.diffusion.config import DiffusionConfig
from ldm_cli.core.diffusion.process import process_of
from ldm_cli.data.batch import Batch
from ldm_cli.errors import RecipeError
from ldm_cli.families.clip_image_encoder import outline_image_tower
from ldm_cli.families.clip_text_encoder import CLIPTextEncoder
from ldm_cli.families.family import Family
from ldm_cli.families.prior import EMBEDDINGS
from ldm_cli.families.stable_diffusion import StableDiffusion
from ldm_cli.families.unclip import UnCLIP, decoder_problems, our_noising
from ldm_cli.formats.pipeline_folder import IMAGE_ENCODER
from ldm_cli.recipe.image_embedding_config import ImageEmbeddingConfig
from ldm_cli.recipe.schema import TrainUnetRecipe
from ldm_cli.recipe.train_recipe import known
from ldm_cli.stages.support.batch_encoder import BatchEncoder
from ldm_cli.stages.support.embedding_statistics import measured_normalizer
from ldm_cli.stages.support.model_sizes import model_at
from ldm_cli.stages.support.training_run import Workbench

_PURPOSES = ("image noise", "image noise level", "image dropout")


class ImageCondition:
    """Gives conditions the embeddings of the pictures: see `Denoising`.

    Each sample has a noise level of its own, all of them alike likely.
    """

    def __init__(
        self, config: ImageEmbeddingConfig, recipe: TrainUnetRecipe, bench: Workbench, encoder: BatchEncoder
    ) -> None:
        self._dropout, self._image_encoder = config.dropout, encoder.image_encoder
        self._normalizer = measured_normalizer(recipe, bench, encoder, config.num_measured)
        self._process = process_of(DiffusionConfig.from_mapping(our_noising().settings.diffusion))
        keys = ({name: philox.key(recipe.seed, prefix + name) for name in _PURPOSES} for prefix in ("validation ", ""))
        self._fixed_keys, self._keys = keys

    def __call__(
        self, condition: Condition, batch: Batch, moments: Mapping[str, Tensor], *, is_training: bool
    ) -> Condition:
        """The condition with `pooled`; without dropout outside of training."""
        embeddings, keys = moments[EMBEDDINGS], self._keys if is_training else self._fixed_keys
        place = batch.epoch, batch.position
        u = philox.uniform(keys["image noise level"], *place, 1)[:, 0]
        noise = philox.normal(keys["image noise"], *place, tuple(embeddings.shape[1:]))
        pooled = self._normalizer.augmented(embeddings, u, noise, self._process)
        if is_training:
            is_kept = philox.uniform(keys["image dropout"], *place, 1) >= self._dropout
            pooled = torch.where(is_kept, pooled, 0.0)
        return replace(condition, pooled=pooled)

    def family(self, plain: Family) -> UnCLIP:
        """The family of the decoder, of one without image embeddings."""
        if not isinstance(plain, StableDiffusion) or not isinstance(plain.encoder, CLIPTextEncoder):
            raise RecipeError("image_embedding needs a CLIP as text_encoder", "the pipelines of unCLIP know no other")
        parts = plain.denoiser, plain.codec, plain.encoder, plain.settings
        return UnCLIP(*parts, normalizer=self._normalizer, image_encoder=self._image_encoder)


def outline_image_encoder(recipe: TrainUnetRecipe, notes: list[str]) -> dict[str, nn.Module | None]:
    """The image encoder of a recipe on the meta device, if it names one; a missing one is None, and noted.

    Raises:
        RecipeError: the U-Net does not fit its embeddings.
    """
    if recipe.image_embedding is None:
        return {}
    tower = model_at("image_embedding.image_encoder", recipe.image_embedding.image_encoder, outline_image_tower, notes)
    problems = () if tower is None else tuple(decoder_problems(known(recipe.unet, "unet"), tower.config.projection_dim))
    if problems:
        raise RecipeError("the parts do not fit together", "; ".join(problems), "change unet", problems=problems)
    return {IMAGE_ENCODER: tower}
