"""What the families with a denoiser of an autoencoder's latents share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import ValidationError

from ldm_cli.config import causes
from ldm_cli.core.compiling import compile_whole
from ldm_cli.core.diffusion.config import DiffusionConfig
from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.latent_space import standardized
from ldm_cli.core.models.sd3_transformer_2d import SD3Transformer2DModel
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig
from ldm_cli.core.precision import DTYPES
from ldm_cli.errors import CheckpointError
from ldm_cli.families.clip_pair_encoder import CLIPPairEncoder
from ldm_cli.families.clip_t5_encoder import CLIPT5Encoder
from ldm_cli.families.clip_text_encoder import CLIPTextEncoder
from ldm_cli.families.codec_folder import Autoencoder
from ldm_cli.families.family import Family, place
from ldm_cli.families.t5_encoder import T5Encoder, T5TextEncoder
from ldm_cli.formats import pipeline_folder as layout
from ldm_cli.formats.model_source import has_model_json, read_model_json, weights_sha256
from ldm_cli.formats.save_model import save_model
from ldm_cli.formats.scheduler_file import SchedulerSettings, read_scheduler, write_scheduler

TextEncoder = CLIPTextEncoder | CLIPPairEncoder | CLIPT5Encoder | T5Encoder
Text = CLIPTextEncoder | T5Encoder | T5TextEncoder


@dataclass(frozen=True, eq=False)
class LatentDiffusion(Family):
    """A text-to-image model with a denoiser of the latents of an autoencoder."""

    denoiser: UNet2DConditionModel | SD3Transformer2DModel
    codec: Autoencoder
    encoder: TextEncoder

    pipelines: ClassVar[tuple[str, ...]]
    """Classes of diffusers whose folders are opened; that of the folders that are written usually comes first."""
    absent: ClassVar[tuple[str, ...]]
    """Components that these classes know and that are not written."""

    @cached_property
    def weights_sha256(self) -> dict[str, str]:
        """Of T5 as well, where there is one beside CLIP."""
        found = dict(super().weights_sha256)
        if self.folder is not None and isinstance(self.encoder, CLIPT5Encoder) and self.encoder.t5 is not None:
            found[layout.TEXT_ENCODER_3] = weights_sha256(self.folder / layout.TEXT_ENCODER_3)
        return found

    @property
    def pipeline(self) -> str:
        """The class of diffusers whose folder is written."""
        return self.pipelines[0]

    @property
    def takes_mask(self) -> bool:
        """Whether the denoiser is one for inpainting."""
        return self.denoiser.config.in_channels == _channels_with_mask(self.codec.channels)

    @property
    def scheduler_class(self) -> str:
        """The class of diffusers whose scheduler file is written."""
        return self.settings.scheduler_class

    @property
    def guidance_width(self) -> int | None:
        """As a U-Net's `time_cond_proj_dim` says."""
        config = self.denoiser.config
        return config.time_cond_proj_dim if isinstance(config, UNet2DConditionConfig) else None

    def save_codec(self, folder: Path) -> None:
        """Write the autoencoder; errors as in `save`.

        Its shift, unknown to the pipelines of diffusers, is folded into the weights if they allow it.
        """
        weights, config = self.codec.state_dict(), self.codec.config
        if isinstance(self.codec, AutoencoderKL) and self.codec.config.shift_factor:
            ones = torch.ones(self.codec.channels)
            folded = standardized(weights, self.codec.config.shift_factor * ones, ones)
            if folded is not None:
                weights, config = folded, self.codec.config.model_copy(update={"shift_factor": None})
        save_model(folder / layout.VAE, weights, config.to_hugging_face())

    def save_index(self, folder: Path, text: Mapping[str, str], **settings: int) -> None:
        """Write the scheduler, and the index of a folder with everything that `save` writes; errors as there.

        Args:
            text: class of each component that conditions are made with, by subfolder.
            settings: arguments of the pipeline in diffusers.
        """
        write_scheduler(folder, self.settings, self.scheduler_class)
        absent = dict.fromkeys(self.absent)
        own = {self.components[0]: type(self.denoiser).__name__, layout.VAE: type(self.codec).__name__}
        classes = {**absent, layout.SCHEDULER: self.scheduler_class, **text, **own}
        layout.write_index(folder, self.pipeline, classes, settings)

    def placed(self, device: torch.device | str, precision: str) -> None:
        """Bring the networks to the device and compile them if asked to; `force_upcast` keeps the codec out of fp16.

        Text encoders stay in the type in which they were read.
        """
        is_upcast = precision == "fp16" and isinstance(self.codec, AutoencoderKL) and self.codec.config.force_upcast
        place(device, DTYPES[precision], self.denoiser)
        for text in self.encoder.models:
            place(device, next(text.parameters()).dtype, text)
        place(device, torch.float32 if is_upcast else DTYPES[precision], self.codec)
        if self.is_compiled:
            compile_whole(self.denoiser, replayed=self.device.type == "cuda")
            compile_whole(self.codec.decoder, self.codec.encoder)


def pipeline_of(folder: Path) -> str | None:
    """The class of diffusers that a folder's index names; None if it has no index."""
    index = folder / layout.INDEX_NAME
    return read_model_json(index).get("_class_name") if has_model_json(index) else None


def read_settings(folder: Path) -> SchedulerSettings:
    """What the scheduler of a pipeline folder says.

    Raises:
        InputNotFoundError, CheckpointError: it is missing, or asks for something that is not implemented.
    """
    settings = read_scheduler(folder, pipeline_of(folder) or "")
    expect_known_process(settings, folder / layout.SCHEDULER_FILE)
    return settings


def expect_known_process(settings: SchedulerSettings, file: Path) -> None:
    """Make sure that the process which a scheduler file describes is implemented.

    Raises:
        CheckpointError: it is not.
    """
    try:
        DiffusionConfig.from_mapping(settings.diffusion)
    except ValidationError as error:
        raise CheckpointError(f"cannot use '{file}'", "; ".join(causes(error))) from error


def expect_fitting_parts(
    folder: Path | None,
    unet: UNet2DConditionConfig,
    codec: Autoencoder,
    texts: Mapping[str, Text],
    further: Sequence[str],
) -> None:
    """Make sure that the parts of a family belong together.

    Args:
        folder: of the family; None: of no folder.
        unet, codec: the U-Net's configuration and the autoencoder.
        texts: text encoders by subfolder, whose states are side by side; those of a T5 that is not alone, after them.
        further: problems that the family has found itself.

    Raises:
        CheckpointError: naming each problem.
    """
    channels = codec.channels
    pairs = [("unet.out_channels", unet.out_channels, "vae.latent_channels", channels)]
    if unet.in_channels != _channels_with_mask(channels):
        pairs.append(("unet.in_channels", unet.in_channels, "vae.latent_channels", channels))
    if isinstance(unet.cross_attention_dim, int):
        widths, sizes = [text.width for text in texts.values()], [f"{name}.hidden_size" for name in texts]
        width, names = sum(widths), " + ".join(sizes)
        if layout.TEXT_ENCODER_3 in texts:
            width, names = max(widths), f"the larger of {' and '.join(sizes)}"
        pairs.append(("unet.cross_attention_dim", unet.cross_attention_dim, names, width))
    found = [f"{a}={value}, {b}={expected}" for a, value, b, expected in pairs if value != expected]
    found += further
    for name, text in texts.items():
        num_tokens, vocab_size = text.tokenizer.vocab_size, text.model.config.vocab_size
        if num_tokens > vocab_size:
            found.append(f"the {layout.tokenizer_of(name)} has {num_tokens} tokens, the {name} {vocab_size}")
    if found:
        owner = "the model" if folder is None else f"'{folder}'"
        raise CheckpointError(f"the parts of {owner} do not fit", "; ".join(found))


def _channels_with_mask(channels: int) -> int:
    """Channels of noisy latents, mask and masked latents."""
    return 2 * channels + 1
