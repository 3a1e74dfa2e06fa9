"""Stable Diffusion 1 and 2 (Rombach et al. 2022, arXiv:2112.10752): a U-Net, an autoencoder, CLIP's text tower or T5,
or both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig
from ldm_cli.core.precision import DTYPES
from ldm_cli.families.clip_t5_encoder import CLIPT5Encoder, has_t5
from ldm_cli.families.clip_text_encoder import CLIPTextEncoder
from ldm_cli.families.codec_folder import Autoencoder, codec_dtype, open_codec, outline_codec
from ldm_cli.families.latent_diffusion import LatentDiffusion, Text, expect_fitting_parts, pipeline_of, read_settings
from ldm_cli.families.t5_encoder import T5Encoder, load_text, outline_t5, outline_text, t5_length_of
from ldm_cli.formats.model_folder import load_model, outline_model
from ldm_cli.formats.pipeline_folder import TEXT_ENCODER, TEXT_ENCODER_3, UNET, VAE, tokenizer_of

UNetTextEncoder = CLIPTextEncoder | T5Encoder | CLIPT5Encoder


@dataclass(frozen=True, eq=False)
class StableDiffusion(LatentDiffusion):
    """A Stable Diffusion model; `save` writes a folder that `StableDiffusionPipeline.from_pretrained` opens."""

    denoiser: UNet2DConditionModel
    encoder: UNetTextEncoder

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
        clip, t5 = ("CLIPTextModel", "CLIPTokenizer"), ("T5EncoderModel", "T5TokenizerFast")
        kinds = {TEXT_ENCODER: t5 if isinstance(self.encoder, T5Encoder) else clip}
        if isinstance(self.encoder, CLIPT5Encoder):
            kinds[TEXT_ENCODER_3] = t5
        text = {name: model for name, (model, _) in kinds.items()}
        text |= {tokenizer_of(name): tokenizer for name, (_, tokenizer) in kinds.items()}
        self.save_index(folder, text, requires_safety_checker=False, **self.encoder.index_settings)


def is_mine(folder: Path) -> bool:
    """Whether the folder holds a Stable Diffusion pipeline."""
    return pipeline_of(folder) in StableDiffusion.pipelines


def open_folder(folder: Path, device: torch.device | str, precision: str, *, compiled: bool = False) -> StableDiffusion:
    """Read a folder; see `open_family`."""
    settings, dtype = read_settings(folder), DTYPES[precision]
    denoiser = load_model(UNet2DConditionModel, folder / UNET, dtype=dtype)
    family = StableDiffusion(
        denoiser=denoiser,
        codec=open_codec(folder / VAE, codec_dtype(precision)),
        encoder=_open_encoder(folder, denoiser.config, dtype),
        settings=settings,
        folder=folder,
        is_compiled=compiled,
    )
    check_fit(folder, denoiser.config, family.codec, _texts(family.encoder))
    family.placed(device, precision)
    return family


def _open_encoder(folder: Path, unet: UNet2DConditionConfig, dtype: torch.dtype) -> UNetTextEncoder:
    """Read the text encoders of a folder."""
    if has_t5(folder):
        texts = {name: folder / name for name in (TEXT_ENCODER, TEXT_ENCODER_3)}
        width, length = max(unet.per_level(unet.cross_attention_dim)), t5_length_of(folder / TEXT_ENCODER)
        return CLIPT5Encoder.load(texts, width, dtype=dtype, t5_length=length)
    return load_text(folder / TEXT_ENCODER, dtype)


def outline_folder(folder: Path) -> dict[str, nn.Module]:
    """See `outline_family`."""
    read_settings(folder)
    unet = outline_model(UNet2DConditionModel, folder / UNET)
    vae = outline_codec(folder / VAE)
    texts: dict[str, Text] = {TEXT_ENCODER: outline_text(folder / TEXT_ENCODER)}
    if has_t5(folder):
        texts[TEXT_ENCODER_3] = outline_t5(folder / TEXT_ENCODER_3)
    check_fit(folder, unet.config, vae, texts)
    return {UNET: unet, VAE: vae, **{name: text.model for name, text in texts.items()}}


def _texts(encoder: UNetTextEncoder) -> Mapping[str, Text]:
    """All text encoders, by component."""
    return encoder.texts if isinstance(encoder, CLIPT5Encoder) else {TEXT_ENCODER: encoder}


def check_fit(folder: Path | None, unet: UNet2DConditionConfig, codec: Autoencoder, texts: Mapping[str, Text]) -> None:
    """Make sure that the components belong together.

    Raises:
        CheckpointError: their channels, widths or vocabularies differ, or the U-Net needs conditions that none gives.
    """
    further = [f"unet.{field} asks for a condition that is not supported" for field in unet.pooled_fields]
    expect_fitting_parts(folder, unet, codec, texts, further)
