"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv:2403.03206): a flow, a Transformer, two CLIPs and T5."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from ldm_cli.core.diffusion.process import Flow, Process
from ldm_cli.core.models.autoencoder_kl import AutoencoderKL
from ldm_cli.core.models.clip import CLIPTextModelWithProjection
from ldm_cli.core.models.sd3_transformer_2d import SD3Transformer2DModel
from ldm_cli.core.models.sd3_transformer_2d_config import SD3Transformer2DConfig
from ldm_cli.core.models.t5_encoder import T5EncoderModel
from ldm_cli.core.precision import DTYPES
from ldm_cli.errors import CheckpointError
from ldm_cli.families.clip_t5_encoder import CLIPT5Encoder, has_t5
from ldm_cli.families.clip_text_encoder import outline_tower
from ldm_cli.families.codec_folder import Autoencoder, codec_dtype, open_codec, outline_codec
from ldm_cli.families.latent_diffusion import LatentDiffusion, pipeline_of, read_settings
from ldm_cli.families.t5_encoder import t5_length_of
from ldm_cli.formats.model_folder import load_model, outline_model
from ldm_cli.formats.pipeline_folder import (
    TEXT_ENCODER,
    TEXT_ENCODER_2,
    TEXT_ENCODER_3,
    TRANSFORMER,
    VAE,
    tokenizer_of,
)
from ldm_cli.formats.save_model import save_model


@dataclass(frozen=True, eq=False)
class StableDiffusion3(LatentDiffusion):
    """A Stable Diffusion 3 model; `save` writes a folder that `StableDiffusion3Pipeline.from_pretrained` opens."""

    denoiser: SD3Transformer2DModel
    encoder: CLIPT5Encoder

    components: ClassVar[tuple[str, ...]] = (TRANSFORMER, VAE, TEXT_ENCODER, TEXT_ENCODER_2)
    pipelines: ClassVar[tuple[str, ...]] = (
        "StableDiffusion3Pipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
    )
    absent: ClassVar[tuple[str, ...]] = (
        "feature_extractor",
        "image_encoder",
        TEXT_ENCODER_3,
        tokenizer_of(TEXT_ENCODER_3),
    )

    def process_at(self, latent_size: tuple[int, int]) -> Process:
        """With a shift by the number of patches, where the scheduler file asks for it."""
        shift, process = self.settings.dynamic_shift, self.process
        if shift is None or not isinstance(process, Flow):
            return process
        rows, columns = (side // self.denoiser.config.patch_size for side in latent_size)
        return replace(process, shift=shift.at(rows * columns), is_shifted_once=True)

    @property
    def patch_size(self) -> int:
        """Of the transformer."""
        return self.denoiser.config.patch_size

    @property
    def largest_size(self) -> int:
        """As far as the transformer has positions."""
        return self.denoiser.config.pos_embed_max_size * self.patch_size

    def num_edit_steps(self, strength: float, num_steps: int) -> int:
        """Rounded up, as in the pipelines of this family."""
        return num_steps - int(num_steps - strength * num_steps)

    @property
    def scheduler_class(self) -> str:
        """Always a flow's."""
        return "FlowMatchEulerDiscreteScheduler"

    def save_codec(self, folder: Path) -> None:
        """Write the autoencoder, with the shift that the pipelines of this family ask for; errors as in `save`."""
        config = self.codec.config.to_hugging_face()
        if isinstance(self.codec, AutoencoderKL) and self.codec.config.shift_factor is None:
            config["shift_factor"] = 0.0
        save_model(folder / VAE, self.codec.state_dict(), config)

    def save_companions(self, folder: Path) -> None:
        """Write all but the transformer; errors as in `save`."""
        self.save_codec(folder)
        self.encoder.save(folder)
        classes = dict.fromkeys((TEXT_ENCODER, TEXT_ENCODER_2), "CLIPTextModelWithProjection")
        text = classes | {tokenizer_of(name): "CLIPTokenizer" for name in classes}
        if self.encoder.t5 is not None:
            text |= {TEXT_ENCODER_3: "T5EncoderModel", tokenizer_of(TEXT_ENCODER_3): "T5TokenizerFast"}
        self.save_index(folder, text, **self.encoder.index_settings)


def is_mine(folder: Path) -> bool:
    """Whether the folder holds a Stable Diffusion 3 pipeline."""
    return pipeline_of(folder) in StableDiffusion3.pipelines


def open_folder(
    folder: Path, device: torch.device | str, precision: str, *, compiled: bool = False
) -> StableDiffusion3:
    """Read a folder; see `open_family`."""
    settings, dtype = read_settings(folder), DTYPES[precision]
    denoiser = load_model(SD3Transformer2DModel, folder / TRANSFORMER, dtype=dtype)
    width = denoiser.config.joint_attention_dim
    names = [TEXT_ENCODER, TEXT_ENCODER_2, *([TEXT_ENCODER_3] if has_t5(folder) else [])]
    texts, length = {name: folder / name for name in names}, t5_length_of(folder / TEXT_ENCODER)
    encoder = CLIPT5Encoder.load(texts, width, dtype=dtype, t5_length=length)
    codec = open_codec(folder / VAE, codec_dtype(precision))
    family = StableDiffusion3(denoiser, codec, encoder, settings, folder=folder, is_compiled=compiled)
    _check_parts(folder, denoiser.config, codec, encoder.models)
    family.placed(device, precision)
    return family


def outline_folder(folder: Path) -> dict[str, nn.Module]:
    """See `outline_family`."""
    read_settings(folder)
    transformer = outline_model(SD3Transformer2DModel, folder / TRANSFORMER)
    codec = outline_codec(folder / VAE)
    texts: dict[str, nn.Module] = {
        name: outline_tower(folder / name, CLIPTextModelWithProjection) for name in (TEXT_ENCODER, TEXT_ENCODER_2)
    }
    if has_t5(folder):
        texts[TEXT_ENCODER_3] = outline_model(T5EncoderModel, folder / TEXT_ENCODER_3)
    _check_parts(folder, transformer.config, codec, list(texts.values()))
    return {TRANSFORMER: transformer, VAE: codec, **texts}


def _check_parts(folder: Path, config: SD3Transformer2DConfig, codec: Autoencoder, texts: Sequence[nn.Module]) -> None:
    """Raise CheckpointError if channels or widths differ."""
    found = size_problems(config, texts)
    if config.out_channels != codec.channels or config.in_channels not in (codec.channels, 2 * codec.channels + 1):
        found.append(
            f"transformer.in_channels={config.in_channels}, out_channels={config.out_channels}, "
            f"vae.latent_channels={codec.channels}"
        )
    if found:
        raise CheckpointError(f"the parts of '{folder}' do not fit", "; ".join(found))


def size_problems(config: SD3Transformer2DConfig, texts: Sequence[nn.Module]) -> list[str]:
    """Why a transformer cannot take the conditions of these text encoders, one text per problem."""
    towers = [model.config for model in texts if isinstance(model, CLIPTextModelWithProjection)]
    clip_width, pooled = (sum(getattr(t, name) for t in towers) for name in ("hidden_size", "projection_dim"))
    found = []
    if config.pooled_projection_dim != pooled:
        found.append(
            f"transformer.pooled_projection_dim={config.pooled_projection_dim}, the towers project to {pooled}"
        )
    if clip_width > config.joint_attention_dim:
        found.append(f"transformer.joint_attention_dim={config.joint_attention_dim}, the towers' width is {clip_width}")
    for model in texts:
        if isinstance(model, T5EncoderModel) and model.config.d_model != config.joint_attention_dim:
            found.append(
                f"transformer.joint_attention_dim={config.joint_attention_dim}, T5's width is {model.config.d_model}"
            )
    return found
