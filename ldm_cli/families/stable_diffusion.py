"""Stable Diffusion 1 and 2 (Rombach et al. 2022, arXiv:2112.10752): a U-Net, a KL autoencoder, CLIP's text tower."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import ValidationError
from torch import nn

from ldm_cli.config import causes
from ldm_cli.core.compiling import compile_whole
from ldm_cli.core.diffusion.config import DiffusionConfig
from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.clip import CLIPTextModel
from ldm_cli.core.models.clip_config import CLIPTextConfig
from ldm_cli.core.models.latent_space import standardized
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig
from ldm_cli.core.precision import DTYPES
from ldm_cli.data.tokenizer import Tokenizer
from ldm_cli.errors import CheckpointError
from ldm_cli.families.clip_text_encoder import CLIPTextEncoder, text_config_of, tokenizer_folder
from ldm_cli.families.family import Family, place
from ldm_cli.formats import pipeline_folder as layout
from ldm_cli.formats.model_folder import load_model, outline_model
from ldm_cli.formats.model_source import has_model_json, read_model_json
from ldm_cli.formats.save_model import save_model
from ldm_cli.formats.scheduler_file import SchedulerSettings, read_scheduler, write_scheduler

_PIPELINES = (
    layout.PIPELINE_CLASS,
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionInpaintPipelineLegacy",
    "LatentConsistencyModelPipeline",
)


@dataclass(frozen=True, eq=False)
class StableDiffusion(Family):
    """A Stable Diffusion model; `save` writes a folder that `StableDiffusionPipeline.from_pretrained` opens."""

    denoiser: UNet2DConditionModel
    codec: AutoencoderKL
    encoder: CLIPTextEncoder

    components: ClassVar[tuple[str, ...]] = (layout.UNET, layout.VAE, layout.TEXT_ENCODER)

    @property
    def sample_size(self) -> tuple[int | None, int | None]:
        """As the U-Net's `sample_size` says."""
        size = self.denoiser.config.sample_size
        return size if isinstance(size, tuple) else (size, size)

    @property
    def takes_mask(self) -> bool:
        """Whether the U-Net is one for inpainting."""
        return self.denoiser.config.in_channels == _channels_with_mask(self.codec.channels)

    @property
    def guidance_width(self) -> int | None:
        """As the U-Net's `time_cond_proj_dim` says."""
        return self.denoiser.config.time_cond_proj_dim

    def save_denoiser(self, folder: Path) -> None:
        """Write the U-Net; errors as in `save`."""
        save_model(folder / layout.UNET, self.denoiser.state_dict(), self.denoiser.config.to_hugging_face())

    def save_companions(self, folder: Path) -> None:
        """Write all but the U-Net; errors as in `save`.

        The autoencoder's shift, unknown to the pipeline of diffusers, is folded into the weights if they allow it.
        """
        weights, config = self.codec.state_dict(), self.codec.config
        if config.shift_factor:
            ones = torch.ones(config.latent_channels)
            folded = standardized(weights, config.shift_factor * ones, ones)
            if folded is not None:
                weights, config = folded, config.model_copy(update={"shift_factor": None})
        save_model(folder / layout.VAE, weights, config.to_hugging_face())
        self.encoder.save(folder / layout.TEXT_ENCODER, folder / layout.TOKENIZER)
        write_scheduler(folder, self.settings)
        layout.write_index(folder, self.settings.scheduler_class)


def is_mine(folder: Path) -> bool:
    """Whether the folder holds a Stable Diffusion pipeline."""
    index = folder / layout.INDEX_NAME
    return has_model_json(index) and read_model_json(index).get("_class_name") in _PIPELINES


def open_folder(folder: Path, device: torch.device | str, precision: str, *, compiled: bool = False) -> StableDiffusion:
    """Read a folder; see `open_family`. An autoencoder with `force_upcast` is not put in fp16."""
    settings, dtype = _read_settings(folder), DTYPES[precision]
    family = StableDiffusion(
        denoiser=load_model(UNet2DConditionModel, folder / layout.UNET, dtype=dtype),
        codec=load_model(AutoencoderKL, folder / layout.VAE, dtype=torch.float32 if precision == "fp16" else dtype),
        encoder=CLIPTextEncoder.load(folder / layout.TEXT_ENCODER, dtype=dtype),
        settings=settings,
        folder=folder,
        is_compiled=compiled,
    )
    check_fit(family)
    is_upcast = precision == "fp16" and family.codec.config.force_upcast
    place(device, DTYPES[precision], family.denoiser, family.encoder.model)
    place(device, torch.float32 if is_upcast else DTYPES[precision], family.codec)
    if compiled:
        compile_whole(family.denoiser, replayed=family.device.type == "cuda")
        compile_whole(family.codec.decoder, family.codec.encoder)
    return family


def outline_folder(folder: Path) -> dict[str, nn.Module]:
    """See `outline_family`."""
    _read_settings(folder)
    unet = outline_model(UNet2DConditionModel, folder / layout.UNET)
    vae = outline_model(AutoencoderKL, folder / layout.VAE)
    text = outline_model(CLIPTextModel, folder / layout.TEXT_ENCODER, text_config_of, allow_extra=True)
    num_tokens = Tokenizer.load(tokenizer_folder(folder / layout.TEXT_ENCODER)).vocab_size
    _check_parts(folder, unet.config, vae.config.latent_channels, text.config, num_tokens)
    return {layout.UNET: unet, layout.VAE: vae, layout.TEXT_ENCODER: text}


def check_fit(family: StableDiffusion) -> None:
    """Make sure that the components belong together.

    Raises:
        CheckpointError: their channels, widths or vocabularies differ, or the U-Net needs conditions that none gives.
    """
    encoder = family.encoder
    num_tokens = encoder.tokenizer.vocab_size
    _check_parts(family.folder, family.denoiser.config, family.codec.channels, encoder.model.config, num_tokens)


def _read_settings(folder: Path) -> SchedulerSettings:
    pipeline = read_model_json(folder / layout.INDEX_NAME).get("_class_name", layout.PIPELINE_CLASS)
    settings = read_scheduler(folder, pipeline)
    try:
        DiffusionConfig.from_mapping(settings.diffusion)
    except ValidationError as error:
        raise CheckpointError(f"cannot use '{folder / layout.SCHEDULER_FILE}'", "; ".join(causes(error))) from error
    return settings


def _check_parts(
    folder: Path | None, unet: UNet2DConditionConfig, channels: int, text: CLIPTextConfig, num_tokens: int
) -> None:
    """As `check_fit`, of `channels` of the latents and `num_tokens` of the tokenizer."""
    pairs = [("unet.out_channels", unet.out_channels, "vae.latent_channels", channels)]
    if unet.in_channels != _channels_with_mask(channels):
        pairs.append(("unet.in_channels", unet.in_channels, "vae.latent_channels", channels))
    if isinstance(unet.cross_attention_dim, int):
        width = "unet.cross_attention_dim", unet.cross_attention_dim
        pairs.append((*width, "text_encoder.hidden_size", text.hidden_size))
    found = [f"{a}={value}, {b}={expected}" for a, value, b, expected in pairs if value != expected]
    found += [f"unet.{field} asks for a condition that is not supported" for field in unet.pooled_fields]
    if num_tokens > text.vocab_size:
        found.append(f"the tokenizer has {num_tokens} tokens, the text encoder {text.vocab_size}")
    if found:
        place = "the model" if folder is None else f"'{folder}'"
        raise CheckpointError(f"the parts of {place} do not fit", "; ".join(found))


def _channels_with_mask(channels: int) -> int:
    """Channels of noisy latents, mask and masked latents."""
    return 2 * channels + 1
