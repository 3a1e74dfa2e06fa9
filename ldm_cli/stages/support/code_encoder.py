"""The frozen VQ model of an autoregressive recipe: its codes are computed in training, or once before it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ldm_cli.core.models.vq_model import VQModel
from ldm_cli.core.pixels import to_signed
from ldm_cli.core.precision import autocast
from ldm_cli.data.batch import Batch
from ldm_cli.families.autoregressive import CodeGrid
from ldm_cli.families.family import place
from ldm_cli.formats.model_folder import load_model
from ldm_cli.recipe.ar_recipe import TrainArRecipe


class CodeEncoder:
    """Images to indices of codes, always in float32: rounding would choose others.

    Args:
        recipe: names the folder and the memory order.
    """

    def __init__(self, recipe: TrainArRecipe, device: torch.device) -> None:
        self.codec, self._device = CodeGrid(load_model(VQModel, Path(recipe.vq))), device
        place(device, torch.float32, self.codec, channels_last=recipe.train.channels_last)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The network, by what users call it."""
        return {"vq": self.codec}

    def __call__(self, batch: Batch) -> Tensor:
        """Indices int64 [B, 1, h, w] of a batch on the device: out of its cache, or computed."""
        return self.codec.latents(self.moments(batch.images) if batch.moments is None else batch.moments)

    @torch.no_grad()
    def moments(self, images: Tensor, masks: Tensor | None = None) -> dict[str, Tensor]:
        """Images uint8 [B, 3, H, W] → what a cache keeps of them."""
        with autocast(self._device, "fp32"):
            return self.codec.moments(to_signed(images, self._device))
