"""Autoencoder and text encoder of a denoiser's recipe: what is computed in training, or once before it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm_cli.core.cpu import tune_for_cpu
from ldm_cli.core.models.autoencoder_kl import DiagonalGaussian
from ldm_cli.data.batch import Batch
from ldm_cli.data.latent_cache import CacheKey
from ldm_cli.data.sample_decoder import Encoding
from ldm_cli.data.tokenizer import Tokenizer
from ldm_cli.errors import RecipeError
from ldm_cli.formats.model_folder import read_config, weights_sha256
from ldm_cli.recipe.schema import TrainUnetRecipe
from ldm_cli.sampling.components import load_autoencoder, load_text_encoder
from ldm_cli.stages.support.caption_tokens import CaptionTokens
from ldm_cli.stages.train_vae import to_signed

# What config.json of an autoencoder says and the moments do not depend on.
_IRRELEVANT = {"sample_size", "scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast"}
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
        tune_for_cpu(self.vae)
        tune_for_cpu(self.text_encoder)
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


def cache_key(recipe: TrainUnetRecipe) -> CacheKey:
    """What decides the cache of a recipe: the weights and configurations of its models, its preprocessing.

    Raises:
        RecipeError: it crops at random, so that no encoding would serve twice.
        InputNotFoundError, CheckpointError: a model cannot be read.
    """
    if recipe.data.crop == "random":
        raise RecipeError(
            "data.crop=random cannot be cached",
            "every epoch sees another part of each image",
            "set data.crop=center or squash, or train without a cache",
        )
    data, vae, text = recipe.data, Path(recipe.vae), Path(recipe.text_encoder)
    names = ("image_size", "crop", "background", "max_pixels", "max_member_bytes")
    preparation = {f"data.{name}": value for name, value in data.to_mapping().items() if name in names}
    precision = {"train.precision": recipe.train.precision}
    probability = data.flip_probability
    return CacheKey(
        latents={"vae": _model_sha256(vae), **preparation, **precision},
        text={"text_encoder": _model_sha256(text), "tokenizer": Tokenizer.load(text).fingerprint, **precision},
        flips=tuple(flip for flip in (False, True) if probability != (0.0 if flip else 1.0)),
    )


def _model_sha256(folder: Path) -> str:
    config = {k: v for k, v in read_config(folder).items() if not k.startswith("_") and k not in _IRRELEVANT}
    return hashlib.sha256((weights_sha256(folder) + json.dumps(config, sort_keys=True)).encode()).hexdigest()
