"""The frozen CLIP of a prior's recipe: its embeddings are computed in training, or once before it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm_cli.core.models.clip import CLIPTextModelWithProjection
from ldm_cli.families.clip_image_encoder import CLIPImageEncoder
from ldm_cli.families.family import place
from ldm_cli.families.prior import PriorTextEncoder
from ldm_cli.formats.pipeline_folder import IMAGE_ENCODER, TEXT_ENCODER
from ldm_cli.recipe.prior_recipe import TrainPriorRecipe
from ldm_cli.stages.support.batch_encoder import BatchEncoder


class PriorBatchEncoder(BatchEncoder):
    """Images to embeddings and captions to conditions; both are float32, whatever the networks compute in."""

    encoder: PriorTextEncoder

    def __init__(self, recipe: TrainPriorRecipe, device: torch.device, warn: Callable[[str], None]) -> None:
        folder = Path(recipe.clip)
        self.encoder = PriorTextEncoder.load(folder, warn, model_class=CLIPTextModelWithProjection)
        self.image_encoder = images = CLIPImageEncoder.load(folder)
        for model in (images, self.encoder.model):
            place(device, torch.float32, model, channels_last=recipe.train.channels_last)
        self._device, self._precision = device, recipe.train.precision
        self.trains_text = False

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks, by what users call them."""
        images = {} if self.image_encoder is None else {IMAGE_ENCODER: self.image_encoder}
        return {TEXT_ENCODER: self.encoder.model, **images}

    def moments(self, images: Tensor, masks: Tensor | None = None) -> dict[str, Tensor]:
        """Images uint8 [B, 3, H, W] → their embeddings, float32 [B, E]."""
        return self.embeddings(images)
