"""Codec and encoder of a denoiser's recipe, frozen: their results are computed in training, or once before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from ldm_cli.core.codec import PixelCodec
from ldm_cli.core.condition import Condition
from ldm_cli.core.pixels import to_signed
from ldm_cli.core.precision import autocast
from ldm_cli.data.batch import Batch
from ldm_cli.data.cache_manifest import CacheKey
from ldm_cli.data.latent_cache import MASK, LatentCache
from ldm_cli.data.tokenizer import Tokenizer
from ldm_cli.errors import RecipeError
from ldm_cli.families.clip_image_encoder import CLIPImageEncoder
from ldm_cli.families.clip_text_encoder import tokenizer_folder
from ldm_cli.families.codec_folder import Autoencoder, open_codec
from ldm_cli.families.family import model_sha256, place, text_networks
from ldm_cli.families.ip_adapter import IMAGE_FEATURES, PROMPT_ENCODER, image_features_key, open_image_features
from ldm_cli.families.label_encoder import LabelEncoder
from ldm_cli.families.prior import EMBEDDINGS
from ldm_cli.formats.model_source import weights_sha256
from ldm_cli.formats.pipeline_folder import IMAGE_ENCODER
from ldm_cli.recipe.ar_recipe import TrainArRecipe
from ldm_cli.recipe.prior_recipe import TrainPriorRecipe
from ldm_cli.recipe.schema import TrainUnetRecipe
from ldm_cli.stages.support.pixel_training import with_classes
from ldm_cli.stages.support.text_encoders import open_text_encoder, text_key

# Fields of an autoencoder's config.json on which the moments do not depend.
_IRRELEVANT = {"sample_size", "scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast"}


class BatchEncoder:
    """Images to moments and captions to conditions; both are float32, whatever the networks compute in.

    Args:
        recipe: names the folders, the precision and the memory order.
        warn: called once if captions are cut.

    Attributes:
        trains_text: whether conditions have gradients, of the text encoders or of adapters on them.
    """

    def __init__(self, recipe: TrainUnetRecipe, device: torch.device, warn: Callable[[str], None]) -> None:
        self.codec: Autoencoder | PixelCodec = PixelCodec() if recipe.is_of_pixels else open_codec(Path(recipe.vae))
        text = open_text_encoder(recipe, warn) if recipe.text_encoder else None
        self.encoder = with_classes(text, recipe, device)
        self.image_encoder: CLIPImageEncoder | None = None
        if recipe.image_embedding is not None:
            self.image_encoder = CLIPImageEncoder.load(Path(recipe.image_embedding.image_encoder))
        self.images = None if recipe.image_prompt is None else open_image_features(recipe.image_prompt)
        for model in self.networks.values():
            place(device, next(model.parameters()).dtype, model, channels_last=recipe.train.channels_last)
        self._device, self._precision = device, recipe.train.precision
        self.trains_text = False

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks, by what users call them."""
        images = {} if self.image_encoder is None else {IMAGE_ENCODER: self.image_encoder}
        images |= {} if self.images is None else {PROMPT_ENCODER: self.images.encoder}
        return {
            **({"vae": self.codec} if isinstance(self.codec, nn.Module) else {}),
            **text_networks(self.encoder.models),
            **images,
        }

    def prepare(self, batch: Batch) -> Batch:
        """With the tokens of its captions, unless it is out of a cache; on the host."""
        if batch.condition:
            return batch
        tokens = self.encoder.tokens(batch.captions)
        if isinstance(self.encoder, LabelEncoder):
            tokens = self.encoder.labelled(tokens, batch.labels)
        return replace(batch, tokens=tokens)

    def __call__(self, batch: Batch) -> tuple[dict[str, Tensor], Condition]:
        """Moments and conditions of a prepared batch on the device: out of the cache, or computed."""
        moments = self.moments_of(batch)
        if not batch.condition:
            return moments, self.condition_of(batch.tokens)
        return moments, Condition(**batch.condition).map(_as_float32)

    def moments_of(self, batch: Batch) -> dict[str, Tensor]:
        """The moments of a batch's images: out of the cache, or computed."""
        if batch.moments is None:
            return self.moments(batch.images, batch.masks)
        return {name: tensor.float() for name, tensor in batch.moments.items()}

    @torch.no_grad()
    def moments(self, images: Tensor, masks: Tensor | None = None) -> dict[str, Tensor]:
        """Images uint8 [B, 3, H, W] → the codec's moments; masks uint8 [B, 1, H, W] → `mask`, averaged over each
        latent's pixels, float32 [B, 1, h, w] in 0 … 1; the embeddings of the images or, with image prompts,
        `IMAGE_FEATURES`, where the recipe asks for them."""
        with autocast(self._device, self._precision):
            moments = self.codec.moments(to_signed(images, self._device))
            if self.images is not None:
                moments[IMAGE_FEATURES] = self.images(images.to(self._device)).float()
        moments |= self.embeddings(images)
        if masks is not None:
            moments[MASK] = avg_pool2d(masks.to(self._device).float() / 255, self.codec.factor)
        return moments

    def embeddings(self, images: Tensor) -> dict[str, Tensor]:
        """Images uint8 [B, 3, H, W] → their embeddings, float32 [B, E]; nothing without an image encoder."""
        if self.image_encoder is None:
            return {}
        with torch.no_grad(), autocast(self._device, self._precision):
            return {EMBEDDINGS: self.image_encoder(images.to(self._device, non_blocking=True)).float()}

    def condition(self, captions: Sequence[str]) -> Condition:
        """B captions → B rows."""
        return self.condition_of(self.encoder.tokens(captions))

    def condition_of(self, tokens: Mapping[str, Tensor]) -> Condition:
        """The conditions of captions from their tokens, on any device."""
        has_gradient = self.trains_text and torch.is_grad_enabled()
        with torch.set_grad_enabled(has_gradient), autocast(self._device, self._precision):
            condition = self.encoder.encode_tokens(tokens)
        return condition.map(_as_float32)

    def cached(self, cache: LatentCache, caption: str) -> Condition:
        """The condition of a caption out of a cache: one row, on the device."""
        return Condition(**cache.condition(caption)).map(lambda tensor: _as_float32(tensor[None].to(self._device)))


def _as_float32(tensor: Tensor) -> Tensor:
    """The tensor; as float32 unless it holds integers."""
    return tensor.float() if tensor.is_floating_point() else tensor


def cache_key(recipe: TrainUnetRecipe | TrainArRecipe | TrainPriorRecipe) -> CacheKey:
    """What decides the cache of a recipe: the weights and configurations of its models, its preprocessing.

    Raises:
        RecipeError: there is no autoencoder; or it crops at random, so that no encoding would serve twice, or to other
            shapes than the square.
        InputNotFoundError, CheckpointError: a model cannot be read.
    """
    if isinstance(recipe, TrainUnetRecipe) and recipe.is_of_pixels:
        raise RecipeError("vae=pixels leaves nothing to cache", "the pictures are their own latents", "train without")
    if recipe.data.crop in ("random", "native"):
        raise RecipeError(
            f"data.crop={recipe.data.crop} cannot be cached",
            "every epoch sees another part of each image",
            "set data.crop=center or squash, or train without a cache",
        )
    if recipe.data.aspect_buckets is not None:
        raise RecipeError(
            "data.aspect_buckets cannot be cached",
            "a cache holds the square of each image",
            "remove data.aspect_buckets, or train without a cache",
        )
    data = recipe.data
    names = ("image_size", "crop", "background", "max_pixels", "max_member_bytes", "mask")
    preparation = {f"data.{name}": value for name, value in data.to_mapping().items() if name in names}
    flips = tuple(flip for flip in (False, True) if data.flip_probability != (0.0 if flip else 1.0))
    if isinstance(recipe, TrainArRecipe):
        # The codes are computed in float32, and captions cost nothing to encode.
        return CacheKey({"vq": weights_sha256(Path(recipe.vq)), **preparation}, text={}, flips=flips)
    precision = {"train.precision": recipe.train.precision}
    if isinstance(recipe, TrainPriorRecipe):
        clip = {"clip": model_sha256(Path(recipe.clip))}
        tokenizer = {"tokenizer": Tokenizer.load(tokenizer_folder(Path(recipe.clip))).fingerprint}
        return CacheKey({**clip, **preparation, **precision}, {**clip, **tokenizer, **precision}, flips)
    if recipe.image_prompt is not None:
        preparation |= image_features_key(Path(recipe.image_prompt.image_encoder), recipe.image_prompt.kind)
    images = {}
    if recipe.image_embedding is not None:
        images = {IMAGE_ENCODER: model_sha256(Path(recipe.image_embedding.image_encoder))}
    return CacheKey(
        latents={"vae": model_sha256(Path(recipe.vae), _IRRELEVANT), **images, **preparation, **precision},
        # Where the text encoder is trained, only its tokens stay the same.
        text={} if recipe.train_text_encoder else {**text_key(recipe), **precision},
        flips=flips,
    )
