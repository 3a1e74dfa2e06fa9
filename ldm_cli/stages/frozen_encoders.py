"""Autoencoder and text encoder of a denoiser's recipe: what is computed in training, or once before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm_cli.core.models.autoencoder_kl import DiagonalGaussian
from ldm_cli.data.loader import Batch
from ldm_cli.data.sample import Encoding
from ldm_cli.data.tokenizer import Tokenizer
from ldm_cli.recipe.schema import TrainUnetRecipe
from ldm_cli.sampling.components import load_autoencoder, load_text_encoder
from ldm_cli.stages.caption_tokens import CaptionTokens
from ldm_cli.stages.train_vae import to_signed

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class FrozenEncoders:
    """The two models as the recipe wants them; what they give is float32, whatever they compute in.

    Args:
        recipe: names the folders, the precision and the memory order.
        device: where they compute.
        warn: told once when captions are cut.
    """

    def __init__(self, recipe: TrainUnetRecipe, device: torch.device, warn: Callable[[str], None]) -> None:
        self.vae = load_autoencoder(Path(recipe.vae)).to(device).requires_grad_(False).eval()
        self.text_encoder = load_text_encoder(Path(recipe.text_encoder)).to(device).requires_grad_(False).eval()
        self.tokenizer = Tokenizer.load(Path(recipe.text_encoder))
        if recipe.train.channels_last:
            self.vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._device, self._dtype = device, _AUTOCAST.get(recipe.train.precision)
        self._tokens = CaptionTokens(self.tokenizer, self.text_encoder.config.max_position_embeddings, warn)

    def __call__(self, batch: Batch) -> Encoding:
        """The encoding of a batch's images and captions, on the device."""
        posterior = self.posterior(batch.images)
        return Encoding(posterior.mean, posterior.logvar, self.states(batch.captions))

    @torch.no_grad()
    def posterior(self, images: Tensor) -> DiagonalGaussian:
        """Images uint8 [B, 3, H, W] → posterior over z, [B, C, h, w]."""
        with self._precision():
            posterior = self.vae.encode(to_signed(images, self._device))
        return DiagonalGaussian(posterior.mean.float(), posterior.logvar.float())

    @torch.no_grad()
    def states(self, captions: Sequence[str]) -> Tensor:
        """Captions → the text tower's last hidden states, [B, L, D]."""
        ids = self._tokens(captions).to(self._device)
        with self._precision():
            states: Tensor = self.text_encoder(ids).last_hidden_state
        return states.float()

    def _precision(self) -> torch.autocast:
        return torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None)
