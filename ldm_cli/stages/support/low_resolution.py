"""What `low_resolution` in a recipe adds to the training of a denoiser: small pictures made of the large ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ldm_cli import philox
from ldm_cli.core.codec import Codec, PixelCodec
from ldm_cli.core.condition import Condition
from ldm_cli.core.degradation import blurred, jpeg, resampled
from ldm_cli.core.diffusion.config import DiffusionConfig
from ldm_cli.core.low_resolution_config import LowResolutionConfig
from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.t5_encoder_config import T5EncoderConfig
from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig
from ldm_cli.core.pixels import to_bytes, to_signed
from ldm_cli.core.window import Window
from ldm_cli.data.batch import Batch
from ldm_cli.families import pixel_upscale, stable_diffusion_upscale
from ldm_cli.families.family import Family
from ldm_cli.families.low_resolution import LowResolution
from ldm_cli.families.pixel_diffusion import pixel_settings
from ldm_cli.formats.scheduler_file import our_settings
from ldm_cli.recipe.schema import TrainUnetRecipe

_CUT_OFF = {"dynamic_thresholding_ratio": 1.0, "sample_max_value": 1.0}
_PURPOSES = ("low-resolution noise", "low-resolution level", "blur", "JPEG")


class LowResolutionTraining:
    """The small pictures of a batch, and how the denoiser is given them.

    Their degradations and their noise are functions of the sample's epoch and position. For validation, they are as the
    pictures of an untouched file: neither blurred nor compressed, with noise of `noise_level`.

    Args:
        low: of the family.
    """

    def __init__(self, config: LowResolutionConfig, low: LowResolution, seed: int) -> None:
        self._config, self._low = config, low
        self._keys = {purpose: philox.key(seed, purpose) for purpose in _PURPOSES}
        self._fixed_key = philox.key(seed, f"validation {_PURPOSES[0]}")

    def __call__(
        self, condition: Condition, batch: Batch, moments: Mapping[str, Tensor], *, is_training: bool
    ) -> Condition:
        """The condition of a batch of images on the device, with small pictures and levels: see `Denoising`."""
        signed = to_signed(batch.images, batch.images.device)
        small = self._degraded(batch, signed) if is_training else self._shrunk(signed)
        size = [side * self._low.latent_factor for side in small.shape[-2:]]
        key = self._keys[_PURPOSES[0]] if is_training else self._fixed_key
        noise = philox.normal(key, batch.epoch, batch.position, (3, *size))
        level = torch.full_like(batch.position, self._low.noise_level)
        if is_training:
            high = self._low.max_noise_level + 1
            level = philox.integers(self._keys["low-resolution level"], batch.epoch, batch.position, 1, high)[:, 0]
        return self._low.conditioned(condition, small, noise, level, Window(0, 0, size[0], size[1]))

    def pictures(self, batches: Sequence[Batch], count: int) -> list[Tensor]:
        """The first small pictures of validation, uint8 [3, h, w] each, on the host."""
        images = [image for batch in batches for image in batch.images][:count]
        small = [self._shrunk(to_signed(image[None], torch.device("cpu"))) for image in images]
        return [to_bytes(picture)[0] for picture in small]

    def _degraded(self, batch: Batch, images: Tensor) -> Tensor:
        blur, quality = (
            philox.uniform(self._keys[purpose], batch.epoch, batch.position, 1)[:, 0] for purpose in ("blur", "JPEG")
        )
        if self._config.blur > 0.0:
            images = blurred(images, self._config.blur * self._config.factor * blur)
        small = self._shrunk(images)
        if self._config.jpeg is not None:
            small = jpeg(small, (self._config.jpeg + (101 - self._config.jpeg) * quality).floor())
        return small

    def _shrunk(self, images: Tensor) -> Tensor:
        """At low resolution, rounded as in a file."""
        height, width = (side // self._config.factor for side in images.shape[-2:])
        small = resampled(images, (height, width), corners=self._low.latent_factor > 1)
        return ((small.clamp(-1.0, 1.0) + 1.0) * 127.5).round() / 127.5 - 1.0


def open_low_resolution(recipe: TrainUnetRecipe, family: Family) -> LowResolutionTraining | None:
    """The small pictures of a recipe; None where it asks for none."""
    if recipe.low_resolution is None or family.low_resolution is None:
        return None
    return LowResolutionTraining(recipe.low_resolution, family.low_resolution, recipe.seed)


def upscaler(
    denoiser: Any, codec: Any, encoder: Any, diffusion: DiffusionConfig, config: LowResolutionConfig
) -> Family:
    """The family of a denoiser that enlarges pictures, of latents or of pixels."""
    level, highest = min(config.noise_level, config.noise_augmentation), config.noise_augmentation
    if isinstance(codec, PixelCodec):
        low = LowResolution(config.factor, config.factor, highest, level, pixel_upscale.NOISING_BETAS)
        # A division by the largest values would change colours that the small picture decides: cut them off.
        settings = replace(pixel_settings(diffusion.to_mapping()), threshold=_CUT_OFF)
        return pixel_upscale.PixelUpscale(denoiser, codec, encoder, settings, low_resolution=low)
    low = LowResolution(config.factor, 1, highest, level, stable_diffusion_upscale.NOISING_BETAS)
    settings = our_settings(diffusion.to_mapping())
    return stable_diffusion_upscale.StableDiffusionUpscale(denoiser, codec, encoder, settings, low_resolution=low)


def upscaler_problems(recipe: TrainUnetRecipe, codec: Codec, texts: Sequence[nn.Module]) -> list[str]:
    """What keeps the parts of a recipe with a U-Net from enlarging pictures; nothing where it does not ask for that.

    Args:
        texts: the text encoders, on any device.
    """
    config, unet = recipe.low_resolution, recipe.model
    if config is None or not isinstance(unet, UNet2DConditionConfig):
        return []
    size, problems = recipe.data.image_size, []
    if not isinstance(codec, PixelCodec):
        problems += stable_diffusion_upscale.unet_problems(unet, codec.channels, config.noise_augmentation)
        if len(texts) > 1 or isinstance(texts[0].config, T5EncoderConfig):
            problems.append("low_resolution in latents goes with one text_encoder, a CLIP")
        if isinstance(codec, AutoencoderKL):
            problems += stable_diffusion_upscale.codec_problems(codec.config)
        else:
            problems.append(f"low_resolution in latents needs an AutoencoderKL, and vae is a {type(codec).__name__}")
        if config.factor != codec.factor:
            problems.append(f"low_resolution.factor={config.factor}, but the autoencoder's is {codec.factor}")
    if size % config.factor:
        problems.append(f"data.image_size={size} is no multiple of low_resolution.factor={config.factor}")
    return problems
