"""Diffusion of pixels, without an autoencoder, as Imagen (Saharia et al. 2022, arXiv:2205.11487) and DeepFloyd IF."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from ldm_cli.core.codec import PixelCodec
from ldm_cli.core.compiling import compile_whole
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.core.models.unet_2d_condition_config import UNet2DConditionConfig
from ldm_cli.core.precision import DTYPES
from ldm_cli.data.tokenizer import Tokenizer
from ldm_cli.errors import CheckpointError
from ldm_cli.families.clip_text_encoder import CLIPTextEncoder, outline_tower, tokenizer_folder
from ldm_cli.families.family import Family, place
from ldm_cli.families.label_encoder import LabelEncoder, class_names
from ldm_cli.families.latent_diffusion import pipeline_of, read_settings
from ldm_cli.families.low_resolution import LowResolution
from ldm_cli.families.t5_encoder import T5Encoder, is_t5, outline_t5, t5_length_of
from ldm_cli.formats import pipeline_folder as layout
from ldm_cli.formats.model_folder import load_model, outline_model
from ldm_cli.formats.model_source import has_model_json, read_model_json, weights_sha256
from ldm_cli.formats.pipeline_folder import TEXT_ENCODER, UNET
from ldm_cli.formats.save_model import save_model
from ldm_cli.formats.scheduler_file import SchedulerSettings, our_settings, write_scheduler
from ldm_cli.formats.weight_files import CONFIG_NAME

FamilyT = TypeVar("FamilyT", bound="PixelDiffusion")
PixelEncoder = CLIPTextEncoder | T5Encoder | LabelEncoder
OUT_CHANNELS = 2 * PixelCodec.channels
"""Of the network: the pipelines of IF split them into a prediction and a variance, of which only the first is used."""


@dataclass(frozen=True, eq=False)
class PixelDiffusion(Family):
    """A model of pixels; `save` writes a folder that `IFPipeline.from_pretrained` opens."""

    denoiser: UNet2DConditionModel
    codec: PixelCodec
    encoder: PixelEncoder

    components: ClassVar[tuple[str, ...]] = (UNET, TEXT_ENCODER)
    pipelines: ClassVar[tuple[str, ...]] = ("IFPipeline", "IFImg2ImgPipeline", "IFInpaintingPipeline")
    absent: ClassVar[tuple[str, ...]] = ("feature_extractor", "safety_checker", "watermarker")

    @cached_property
    def weights_sha256(self) -> dict[str, str]:
        """See `ImageGenerator`; without a text encoder where there are only classes."""
        names = (UNET, *([TEXT_ENCODER] if self.encoder.models else []))
        return {} if self.folder is None else {name: weights_sha256(self.folder / name) for name in names}

    @property
    def sample_size(self) -> tuple[int | None, int | None]:
        """As the denoiser's `sample_size` says."""
        size = self.denoiser.config.sample_size
        return size if isinstance(size, tuple) else (size, size)

    def save_denoiser(self, folder: Path) -> None:
        """See `Family`."""
        save_model(folder / UNET, self.denoiser.state_dict(), self.denoiser.config.to_hugging_face())

    def save_companions(self, folder: Path) -> None:
        """Write all but the U-Net; errors as in `save`."""
        self.save_parts(folder, {}, {})

    def save_parts(self, folder: Path, further: Mapping[str, str], further_settings: Mapping[str, int]) -> None:
        """Write all but the U-Net, and an index with further components and settings; errors as in `save`."""
        self.encoder.save(folder)
        text = self.encoder.text if isinstance(self.encoder, LabelEncoder) else self.encoder
        kinds: tuple[str | None, ...] = ("CLIPTextModel", "CLIPTokenizer")
        if text is None or isinstance(text, T5Encoder):
            kinds = (None, None) if text is None else ("T5EncoderModel", "T5TokenizerFast")
        write_scheduler(folder, self.settings, "DDPMScheduler")
        classes = {
            **dict.fromkeys(self.absent),
            layout.SCHEDULER: "DDPMScheduler",
            **dict(zip((TEXT_ENCODER, layout.tokenizer_of(TEXT_ENCODER)), kinds, strict=True)),
            **further,
            UNET: type(self.denoiser).__name__,
        }
        settings = {"requires_safety_checker": False, **self.encoder.index_settings, **further_settings}
        layout.write_index(folder, self.pipelines[0], classes, settings)


def pixel_settings(diffusion: Mapping[str, Any]) -> SchedulerSettings:
    """The settings of a model of pixels that we train: as IF's, with dynamic thresholding.

    Args:
        diffusion: a noise schedule and prediction type; other keys are left out.
    """
    settings = replace(our_settings(diffusion), steps_offset=0, set_alpha_to_one=None)
    return replace(settings, sampler="ddpm", threshold={"dynamic_thresholding_ratio": 0.95, "sample_max_value": 1.5})


def is_mine(folder: Path) -> bool:
    """Whether the folder holds a pipeline of pixels."""
    return pipeline_of(folder) in PixelDiffusion.pipelines


def open_folder(folder: Path, device: torch.device | str, precision: str, *, compiled: bool = False) -> PixelDiffusion:
    """Read a folder; see `open_family`."""
    return opened(PixelDiffusion, folder, device, precision, compiled)


def opened(
    family_class: type[FamilyT],
    folder: Path,
    device: torch.device | str,
    precision: str,
    compiled: bool,
    low_resolution: LowResolution | None = None,
) -> FamilyT:
    """Read a folder as a family of this class, which may enlarge pictures; see `open_family`."""
    denoiser = load_model(UNet2DConditionModel, folder / UNET, dtype=DTYPES[precision])
    text: CLIPTextEncoder | T5Encoder | None = None
    if has_model_json(folder / TEXT_ENCODER / CONFIG_NAME):
        kind = T5Encoder if is_t5(folder / TEXT_ENCODER) else CLIPTextEncoder
        text = kind.load(folder / TEXT_ENCODER, dtype=DTYPES[precision], is_for_pixels=True)
    encoder = _encoder(folder, denoiser.config, text, device, enlarges=low_resolution is not None)
    family = family_class(denoiser, PixelCodec(), encoder, read_settings(folder), folder, compiled, low_resolution)
    place(device, DTYPES[precision], denoiser)
    for model in encoder.models:
        place(device, next(model.parameters()).dtype, model)
    if compiled:
        compile_whole(denoiser, replayed=family.device.type == "cuda")
    return family


def outline_folder(folder: Path, *, enlarges: bool = False) -> dict[str, nn.Module]:
    """See `outline_family`; `enlarges` as in `unet_problems`."""
    read_settings(folder)
    unet, place_of_text = outline_model(UNet2DConditionModel, folder / UNET), folder / TEXT_ENCODER
    text: CLIPTextEncoder | T5Encoder | None = None
    if has_model_json(place_of_text / CONFIG_NAME):
        if is_t5(place_of_text):
            text = T5Encoder(outline_t5(place_of_text), t5_length_of(place_of_text))
        else:
            text = CLIPTextEncoder(outline_tower(place_of_text), Tokenizer.load(tokenizer_folder(place_of_text)))
    _encoder(folder, unet.config, text, "meta", enlarges=enlarges)
    return {UNET: unet, **({} if text is None else {TEXT_ENCODER: text.model})}


def _encoder(
    folder: Path,
    unet: UNet2DConditionConfig,
    text: CLIPTextEncoder | T5Encoder | None,
    device: torch.device | str,
    *,
    enlarges: bool,
) -> PixelEncoder:
    """The encoder of a folder's conditions.

    Raises:
        CheckpointError: the parts do not fit, or the U-Net needs conditions that none gives.
    """
    problems = unet_problems(unet, enlarges=enlarges)
    if text is not None:
        problems += text_problems(unet, text.width)
        num_tokens, vocab_size = text.tokenizer.vocab_size, text.model.config.vocab_size
        if num_tokens > vocab_size:
            problems.append(f"the tokenizer has {num_tokens} tokens, the text_encoder {vocab_size}")
    elif unet.num_class_embeds is None or unet.levels_with_text():
        problems.append("the U-Net attends to text, and there is no text_encoder")
    if problems:
        raise CheckpointError(f"the parts of '{folder}' do not fit", "; ".join(problems))
    if unet.num_class_embeds is None:
        assert text is not None
        return text
    index = folder / layout.INDEX_NAME
    return LabelEncoder(class_names(read_model_json(index), unet.num_class_embeds, index), text, device)


def unet_problems(unet: UNet2DConditionConfig, *, enlarges: bool = False) -> list[str]:
    """What keeps a U-Net from being one of pixels with text or classes or, where it `enlarges` pictures, with text, a
    small picture and the level of its noise."""
    in_channels = PixelCodec.channels * (2 if enlarges else 1)
    problems = [
        f"unet.{name}={getattr(unet, name)}, expected {expected}"
        for name, expected in (("in_channels", in_channels), ("out_channels", OUT_CHANNELS))
        if getattr(unet, name) != expected
    ]
    known = "class_embed_type=timestep" if enlarges else "num_class_embeds="
    if enlarges and known not in unet.pooled_fields:
        problems.append(f"unet.class_embed_type={unet.class_embed_type}, expected timestep")
    others = [field for field in unet.pooled_fields if not field.startswith(known)]
    return problems + [f"unet.{field} asks for a condition that is not supported" for field in others]


def text_problems(unet: UNet2DConditionConfig, width: int) -> list[str]:
    """What keeps a U-Net from text states of a width."""
    if unet.encoder_hid_dim is not None:
        return [] if unet.encoder_hid_dim == width else [f"unet.encoder_hid_dim={unet.encoder_hid_dim}, text {width}"]
    widths = unet.per_level(unet.cross_attention_dim)
    if all(widths[level] == width for level in unet.levels_with_text()):
        return []
    return [f"unet.cross_attention_dim={unet.cross_attention_dim}, text_encoder.hidden_size={width}"]
