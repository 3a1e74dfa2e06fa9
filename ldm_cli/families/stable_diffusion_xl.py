"""Stable Diffusion XL (Podell et al. 2023, arXiv:2307.01952): a U-Net that knows sizes, and two CLIP text towers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from ldm_cli.core.condition import NUM_SIZES
from ldm_cli.core.models.clip import CLIPTextModelWithProjection
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig
from ldm_cli.core.precision import DTYPES
from ldm_cli.errors import CheckpointError
from ldm_cli.families.clip_pair_encoder import CLIPPairEncoder
from ldm_cli.families.clip_text_encoder import outline_encoder
from ldm_cli.families.codec_folder import Autoencoder, codec_dtype, open_codec, outline_codec
from ldm_cli.families.latent_diffusion import LatentDiffusion, expect_fitting_parts, pipeline_of, read_settings
from ldm_cli.formats.model_folder import load_model, outline_model
from ldm_cli.formats.model_source import read_model_json
from ldm_cli.formats.pipeline_folder import (
    INDEX_NAME,
    TEXT_ENCODER,
    TEXT_ENCODER_2,
    UNET,
    VAE,
    ZEROES_EMPTY,
    tokenizer_of,
)


@dataclass(frozen=True, eq=False)
class StableDiffusionXL(LatentDiffusion):
    """A Stable Diffusion XL model; `save` writes a folder that `StableDiffusionXLPipeline.from_pretrained` opens."""

    denoiser: UNet2DConditionModel
    encoder: CLIPPairEncoder

    components: ClassVar[tuple[str, ...]] = (UNET, VAE, TEXT_ENCODER, TEXT_ENCODER_2)
    pipelines: ClassVar[tuple[str, ...]] = (
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
    )
    absent: ClassVar[tuple[str, ...]] = ("feature_extractor", "image_encoder")

    @property
    def takes_sizes(self) -> bool:
        """Always."""
        return True

    def save_companions(self, folder: Path) -> None:
        """Write all but the U-Net; errors as in `save`."""
        self.save_codec(folder)
        self.encoder.save(folder)
        classes = {TEXT_ENCODER: "CLIPTextModel", TEXT_ENCODER_2: "CLIPTextModelWithProjection"}
        text = classes | {tokenizer_of(name): "CLIPTokenizer" for name in classes}
        self.save_index(folder, text, **{ZEROES_EMPTY: self.encoder.zeroes_empty}, **self.encoder.first.index_settings)


def is_mine(folder: Path) -> bool:
    """Whether the folder holds a Stable Diffusion XL pipeline."""
    return pipeline_of(folder) in StableDiffusionXL.pipelines


def open_folder(
    folder: Path, device: torch.device | str, precision: str, *, compiled: bool = False
) -> StableDiffusionXL:
    """Read a folder; see `open_family`."""
    _expect_base(folder)
    settings, dtype = read_settings(folder), DTYPES[precision]
    family = StableDiffusionXL(
        denoiser=load_model(UNet2DConditionModel, folder / UNET, dtype=dtype),
        codec=open_codec(folder / VAE, codec_dtype(precision)),
        encoder=CLIPPairEncoder.load(folder / TEXT_ENCODER, folder / TEXT_ENCODER_2, dtype=dtype),
        settings=settings,
        folder=folder,
        is_compiled=compiled,
    )
    _check_parts(folder, family.denoiser.config, family.codec, family.encoder)
    family.placed(device, precision)
    return family


def outline_folder(folder: Path) -> dict[str, nn.Module]:
    """See `outline_family`."""
    _expect_base(folder)
    read_settings(folder)
    unet = outline_model(UNet2DConditionModel, folder / UNET)
    vae = outline_codec(folder / VAE)
    first = outline_encoder(folder / TEXT_ENCODER)
    second = outline_encoder(folder / TEXT_ENCODER_2, CLIPTextModelWithProjection)
    _check_parts(folder, unet.config, vae, CLIPPairEncoder(first, second))
    return {UNET: unet, VAE: vae, TEXT_ENCODER: first.model, TEXT_ENCODER_2: second.model}


def size_problems(unet: UNet2DConditionConfig, pooled_width: int) -> list[str]:
    """What keeps a U-Net from the conditions of this family; nothing if it takes them.

    Args:
        pooled_width: P, numbers of the pooled text.
    """
    if unet.addition_embed_type != "text_time":
        return [f"unet.addition_embed_type={unet.addition_embed_type}, expected text_time"]
    found, dim = unet.projection_class_embeddings_input_dim, unet.addition_time_embed_dim
    assert dim is not None  # the Config's own check
    expected = pooled_width + NUM_SIZES * dim
    if found == expected:
        return []
    needed = f"{pooled_width} numbers of pooled text and {NUM_SIZES} sizes of {dim} make {expected}"
    return [f"unet.projection_class_embeddings_input_dim={found}, but {needed}"]


def _expect_base(folder: Path) -> None:
    """Raise CheckpointError for a folder without a first text encoder, which is a refiner's."""
    if read_model_json(folder / INDEX_NAME).get(TEXT_ENCODER) == [None, None]:
        cause = "it is a refiner: it has no text_encoder, and asks for an aesthetic score"
        raise CheckpointError(f"cannot use '{folder}'", cause, "give a base model")


def _check_parts(folder: Path, unet: UNet2DConditionConfig, codec: Autoencoder, encoder: CLIPPairEncoder) -> None:
    towers = {TEXT_ENCODER: encoder.first, TEXT_ENCODER_2: encoder.second}
    further = size_problems(unet, encoder.second.model.config.projection_dim)
    expect_fitting_parts(folder, unet, codec, towers, further)
