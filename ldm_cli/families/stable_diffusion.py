"""Stable Diffusion 1 and 2 (Rombach et al. 2022, arXiv:2112.10752): a U-Net, an autoencoder, CLIP's text tower."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig
from ldm_cli.core.precision import DTYPES
from ldm_cli.families.clip_text_encoder import CLIPTextEncoder
from ldm_cli.families.codec_folder import Autoencoder, codec_dtype, open_codec, outline_codec
from ldm_cli.families.latent_diffusion import LatentDiffusion, expect_fitting_parts, pipeline_of, read_settings
from ldm_cli.families.t5_encoder import T5Encoder, load_text, outline_text
from ldm_cli.formats.model_folder import load_model, outline_model
from ldm_cli.formats.pipeline_folder import TEXT_ENCODER, UNET, VAE, tokenizer_of


@dataclass(frozen=True, eq=False)
class StableDiffusion(LatentDiffusion):
    """A Stable Diffusion model; `save` writes a folder that `StableDiffusionPipeline.from_pretrained` opens."""

    denoiser: UNet2DConditionModel
    encoder: CLIPTextEncoder | T5Encoder

    components: ClassVar[tuple[str, ...]] = (UNET, VAE, TEXT_ENCODER)
    pipelines: ClassVar[tuple[str, ...]] = (
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionInpaintPipelineLegacy",
        "LatentConsistencyModelPipeline",
    )
    absent: ClassVar[tuple[str, ...]] = ("feature_extractor", "image_encoder", "safety_checker")

    def save_companions(self, folder: Path) -> None:
        """Write all but the U-Net; errors as in `save`."""
        self.save_codec(folder)
        self.encoder.save(folder)
        has_t5 = isinstance(self.encoder, T5Encoder)
        kinds = ("T5EncoderModel", "T5TokenizerFast") if has_t5 else ("CLIPTextModel", "CLIPTokenizer")
        text = dict(zip((TEXT_ENCODER, tokenizer_of(TEXT_ENCODER)), kinds, strict=True))
        self.save_index(folder, text, requires_safety_checker=False, **self.encoder.index_settings)


def is_mine(folder: Path) -> bool:
    """Whether the folder holds a Stable Diffusion pipeline."""
    return pipeline_of(folder) in StableDiffusion.pipelines


def open_folder(folder: Path, device: torch.device | str, precision: str, *, compiled: bool = False) -> StableDiffusion:
    """Read a folder; see `open_family`."""
    settings, dtype = read_settings(folder), DTYPES[precision]
    family = StableDiffusion(
        denoiser=load_model(UNet2DConditionModel, folder / UNET, dtype=dtype),
        codec=open_codec(folder / VAE, codec_dtype(precision)),
        encoder=load_text(folder / TEXT_ENCODER, dtype),
        settings=settings,
        folder=folder,
        is_compiled=compiled,
    )
    check_fit(family.folder, family.denoiser.config, family.codec, family.encoder)
    family.placed(device, precision)
    return family


def outline_folder(folder: Path) -> dict[str, nn.Module]:
    """See `outline_family`."""
    read_settings(folder)
    unet = outline_model(UNet2DConditionModel, folder / UNET)
    vae, encoder = outline_codec(folder / VAE), outline_text(folder / TEXT_ENCODER)
    check_fit(folder, unet.config, vae, encoder)
    return {UNET: unet, VAE: vae, TEXT_ENCODER: encoder.model}


def check_fit(
    folder: Path | None, unet: UNet2DConditionConfig, codec: Autoencoder, encoder: CLIPTextEncoder | T5Encoder
) -> None:
    """Make sure that the components belong together.

    Raises:
        CheckpointError: their channels, widths or vocabularies differ, or the U-Net needs conditions that none gives.
    """
    further = [f"unet.{field} asks for a condition that is not supported" for field in unet.pooled_fields]
    expect_fitting_parts(folder, unet, codec, {TEXT_ENCODER: encoder}, further)
