"""What `low_resolution` in a recipe adds to the training of a denoiser: small pictures made of the large ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm_cli import philox
from ldm_cli.core.codec import Codec
from ldm_cli.core.condition import Condition
from ldm_cli.core.degradation import blurred, jpeg, resampled
from ldm_cli.core.low_resolution_config import LowResolutionConfig
from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.pixels import to_bytes, to_signed
from ldm_cli.core.window import Window
from ldm_cli.data.batch import Batch
from ldm_cli.families import stable_diffusion_upscale
from ldm_cli.families.low_resolution import LowResolution
from ldm_cli.families.stable_diffusion_upscale import NOISING_BETAS, StableDiffusionUpscale
from ldm_cli.formats.scheduler_file import SchedulerSettings
from ldm_cli.recipe.schema import TrainUnetRecipe
from ldm_cli.reporting import Reporter
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.request import GeneratedImage, ImageRequest
from ldm_cli.sampling.upscaling import Upscaling, upscale

_PURPOSES = ("low-resolution noise", "low-resolution level", "blur", "JPEG")


class LowResolutionTraining:
    """The small pictures of a batch, and how the denoiser is given them.

    Their degradations and their noise are functions of the sample's epoch and position. For validation, they are as the
    pictures of an untouched file: neither blurred nor compressed, with noise of `noise_level`.

    Args:
        config: the settings.
        low: of the family.
        seed: of all random numbers.
    """

    def __init__(self, config: LowResolutionConfig, low: LowResolution, seed: int) -> None:
        self._config, self._low = config, low
        self._keys = {purpose: philox.key(seed, purpose) for purpose in _PURPOSES}
        self._fixed_key = philox.key(seed, f"validation {_PURPOSES[0]}")

    def given(self, batch: Batch, condition: Condition, *, is_training: bool) -> Condition:
        """The condition of a batch of images on the device, with small pictures and levels."""
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

    def pictures(self, batches: Sequence[Batch]) -> list[Tensor]:
        """The small pictures of validation, uint8 [3, h, w] each, on the host."""
        images = [self._shrunk(to_signed(batch.images, torch.device("cpu"))) for batch in batches]
        return [picture for part in images for picture in to_bytes(part)]

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


def upscaler(denoiser: Any, codec: Codec, encoder: Any, settings: SchedulerSettings, config: LowResolutionConfig) -> Any:
    """The family of a denoiser that enlarges pictures."""
    level = min(config.noise_level, config.noise_augmentation)
    low = LowResolution(config.factor, 1, config.noise_augmentation, level, NOISING_BETAS)
    return StableDiffusionUpscale(denoiser, codec, encoder, settings, low_resolution=low)  # type: ignore[arg-type]


def low_resolution_problems(recipe: TrainUnetRecipe, codec: Codec, texts: Sequence[nn.Module]) -> list[str]:
    """What keeps the parts of a recipe from enlarging pictures.

    Args:
        recipe: with `low_resolution` and a U-Net.
        codec: of the latents.
        texts: the text encoders, on any device.
    """
    config: Any = recipe.low_resolution
    problems = [f"low_resolution needs one text_encoder, a CLIP, and there are {len(texts)}"] if len(texts) > 1 else []
    if not isinstance(codec, AutoencoderKL):
        problems.append("low_resolution needs an AutoencoderKL")
    else:
        problems += stable_diffusion_upscale.codec_problems(codec.config)
    if config.factor != codec.factor:
        problems.append(f"low_resolution.factor={config.factor}, but the autoencoder's is {codec.factor}")
    unet: Any = recipe.unet
    return problems + stable_diffusion_upscale.unet_problems(unet, codec.channels, config.noise_augmentation)


def enlarged_samples(
    family: Any, config: SamplingConfig, pictures: Sequence[Tensor], requests: Sequence[ImageRequest], reporter: Reporter
) -> list[GeneratedImage]:
    """Sample pictures of training: for each request the small picture of the same place among the held-out ones."""
    chosen = [pictures[i // config.images_per_prompt % len(pictures)] for i in range(len(requests))]
    return list(upscale(Upscaling(family, config), chosen, requests, reporter))
