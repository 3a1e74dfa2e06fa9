"""Pictures enlarged in latent space: Stable Diffusion's upscaler (Rombach et al. 2022, arXiv:2112.10752, 4.4)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.autoencoder_kl_config import AutoencoderKLConfig
from ldm_cli.core.models.latent_space import standardized
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig
from ldm_cli.core.precision import DTYPES
from ldm_cli.errors import CheckpointError
from ldm_cli.families.clip_text_encoder import CLIPTextEncoder, outline_encoder
from ldm_cli.families.codec_folder import codec_dtype
from ldm_cli.families.latent_diffusion import LatentDiffusion, expect_fitting_parts, pipeline_of, read_settings
from ldm_cli.families.low_resolution import LowResolution, read_noising, write_noising
from ldm_cli.formats.model_folder import load_model, outline_model
from ldm_cli.formats.model_source import read_model_json
from ldm_cli.formats.pipeline_folder import INDEX_NAME, TEXT_ENCODER, UNET, VAE, tokenizer_of
from ldm_cli.formats.save_model import save_model

SCALING_FACTOR = 0.08333
"""Of every upscaler's latents: the pipeline in diffusers puts it in the place of the autoencoder's own."""
NOISING = "low_res_scheduler"
NOISING_BETAS = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "scaled_linear"}
MAX_NOISE_LEVEL, NOISE_LEVEL = "max_noise_level", "noise_level"
"""Settings of the index; the second, the level to take where none is asked for, is ours."""
PICTURE_CHANNELS = 3
_DEFAULT_MAX_LEVEL, _DEFAULT_LEVEL = 350, 20


@dataclass(frozen=True, eq=False)
class StableDiffusionUpscale(LatentDiffusion):
    """An upscaler; `save` writes a folder that `StableDiffusionUpscalePipeline.from_pretrained` opens."""

    denoiser: UNet2DConditionModel
    codec: AutoencoderKL
    encoder: CLIPTextEncoder

    components: ClassVar[tuple[str, ...]] = (UNET, VAE, TEXT_ENCODER)
    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionUpscalePipeline",)
    absent: ClassVar[tuple[str, ...]] = ("feature_extractor", "safety_checker", "watermarker")

    @property
    def takes_mask(self) -> bool:
        """Never."""
        return False

    def save_codec(self, folder: Path) -> None:
        """Write the autoencoder with its latents in the pipeline's unit; errors as in `save`."""
        config, ones = self.codec.config, torch.ones(self.codec.channels)
        mean, deviation = (config.shift_factor or 0.0) * ones, SCALING_FACTOR / config.scaling_factor * ones
        weights = standardized(self.codec.state_dict(), mean, deviation)
        if weights is None:
            raise ValueError("save_codec: " + codec_problems(config)[0])
        save_model(folder / VAE, weights, _in_unit(config).to_hugging_face())

    def save_companions(self, folder: Path) -> None:
        """Write all but the U-Net; errors as in `save`."""
        low = self.low_resolution
        assert low is not None
        self.save_codec(folder)
        self.encoder.save(folder)
        write_noising(folder, NOISING, low.diffusion)
        text = {TEXT_ENCODER: "CLIPTextModel", tokenizer_of(TEXT_ENCODER): "CLIPTokenizer", NOISING: "DDPMScheduler"}
        levels = {MAX_NOISE_LEVEL: low.max_noise_level, NOISE_LEVEL: low.noise_level}
        self.save_index(folder, text, **levels, **self.encoder.index_settings)


def is_mine(folder: Path) -> bool:
    """Whether the folder holds an upscaler's pipeline."""
    return pipeline_of(folder) in StableDiffusionUpscale.pipelines


def open_folder(
    folder: Path, device: torch.device | str, precision: str, *, compiled: bool = False
) -> StableDiffusionUpscale:
    """Read a folder; see `open_family`."""
    dtype = DTYPES[precision]
    codec = load_model(AutoencoderKL, folder / VAE, dtype=codec_dtype(precision))
    codec.config = _in_unit(codec.config)
    family = StableDiffusionUpscale(
        denoiser=load_model(UNet2DConditionModel, folder / UNET, dtype=dtype),
        codec=codec,
        encoder=CLIPTextEncoder.load(folder / TEXT_ENCODER, dtype=dtype),
        settings=read_settings(folder),
        folder=folder,
        is_compiled=compiled,
        low_resolution=_low_resolution(folder, codec),
    )
    _check_parts(folder, family.denoiser.config, codec, family.encoder)
    family.placed(device, precision)
    return family


def outline_folder(folder: Path) -> dict[str, nn.Module]:
    """See `outline_family`."""
    read_settings(folder)
    unet, vae = outline_model(UNet2DConditionModel, folder / UNET), outline_model(AutoencoderKL, folder / VAE)
    _low_resolution(folder, vae)
    encoder = outline_encoder(folder / TEXT_ENCODER)
    _check_parts(folder, unet.config, vae, encoder)
    return {UNET: unet, VAE: vae, TEXT_ENCODER: encoder.model}


def unet_problems(unet: UNet2DConditionConfig, channels: int, max_noise_level: int) -> list[str]:
    """What keeps a U-Net from enlarging pictures in latents of so many channels."""
    problems = [] if unet.num_class_embeds is not None else ["unet.num_class_embeds is null: noise has no level"]
    if unet.num_class_embeds is not None and unet.num_class_embeds <= max_noise_level:
        problems.append(f"unet.num_class_embeds={unet.num_class_embeds}, but noise has levels up to {max_noise_level}")
    problems += [
        f"unet.{field} asks for a condition that is not supported"
        for field in unet.pooled_fields
        if not field.startswith("num_class_embeds=")
    ]
    for name, expected in (("in_channels", channels + PICTURE_CHANNELS), ("out_channels", channels)):
        if (found := getattr(unet, name)) != expected:
            problems.append(f"unet.{name}={found}, but latents and picture have {channels} + 3 channels")
    return problems


def codec_problems(config: AutoencoderKLConfig) -> list[str]:
    """What keeps an autoencoder from the pipeline's unit of latents."""
    missing = [name for name in ("use_quant_conv", "use_post_quant_conv") if not getattr(config, name)]
    return [f"vae.{name} is false: an upscaler's latents need a unit of their own" for name in missing]


def _in_unit(config: AutoencoderKLConfig) -> AutoencoderKLConfig:
    return config.model_copy(update={"scaling_factor": SCALING_FACTOR, "shift_factor": None})


def _low_resolution(folder: Path, codec: AutoencoderKL) -> LowResolution:
    index = read_model_json(folder / INDEX_NAME)
    levels = index.get(MAX_NOISE_LEVEL, _DEFAULT_MAX_LEVEL), index.get(NOISE_LEVEL, _DEFAULT_LEVEL)
    if not all(isinstance(level, int) and 0 <= level < 1000 for level in levels):
        cause = f"{MAX_NOISE_LEVEL}={levels[0]!r} and {NOISE_LEVEL}={levels[1]!r}, expected 0 to 999"
        raise CheckpointError(f"cannot use '{folder / INDEX_NAME}'", cause)
    return LowResolution(codec.factor, 1, levels[0], min(levels), read_noising(folder, NOISING))


def _check_parts(folder: Path, unet: UNet2DConditionConfig, codec: AutoencoderKL, encoder: CLIPTextEncoder) -> None:
    index = read_model_json(folder / INDEX_NAME)
    problems = unet_problems(unet, codec.channels, index.get(MAX_NOISE_LEVEL, _DEFAULT_MAX_LEVEL))
    own = unet.model_copy(update={"in_channels": unet.out_channels})
    expect_fitting_parts(folder, own, codec, {TEXT_ENCODER: encoder}, problems)
