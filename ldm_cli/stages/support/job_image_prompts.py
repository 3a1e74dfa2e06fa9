"""The image prompts of a job: pictures as tokens, and in its denoiser the adapters that attend to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_cli.core.image_prompt import ImagePrompts
from ldm_cli.core.models.ip_adapter import IPAdapter
from ldm_cli.core.models.unet_2d_condition import UNet2DConditionModel
from ldm_cli.errors import UsageError
from ldm_cli.families.clip_image_encoder import CLIPImageEncoder
from ldm_cli.families.family import Family, ImageGenerator, place
from ldm_cli.families.ip_adapter import (
    ImageFeatures,
    expect_fitting_encoder,
    image_encoder_beside,
    ip_adapter_file,
    read_ip_adapter,
)
from ldm_cli.families.open_family import resolve_model
from ldm_cli.formats.model_source import weights_sha256
from ldm_cli.formats.weight_files import tensors_sha256
from ldm_cli.pictures.job import Item
from ldm_cli.pictures.prompt_adapters import ImagePromptEntry
from ldm_cli.pictures.provenance import IMAGE_PROMPT_ROLES, image_prompt_source
from ldm_cli.sampling.edit_input import open_picture
from ldm_cli.sampling.sample_options import ImageTokens
from ldm_cli.storage import file_sha256


@dataclass(frozen=True)
class _Prompt:
    """An entry with the files that it means."""

    image: Path
    adapter: Path
    image_encoder: Path
    scale: float

    @classmethod
    def of(cls, entry: ImagePromptEntry) -> _Prompt:
        file, given = ip_adapter_file(Path(entry.adapter)), entry.image_encoder
        encoder = image_encoder_beside(file) if given is None else resolve_model(Path(given))
        return cls(Path(entry.image), file, encoder, entry.scale)


class JobImagePrompts:
    """The pictures that prompt a job; each adapter and each image encoder is read once."""

    def __init__(self, family: Family, entries: Sequence[ImagePromptEntry]) -> None:
        """Read the files, and give the denoiser the adapters.

        Args:
            family: of the job; its denoiser is a U-Net.
            entries: at least one.

        Raises:
            InputNotFoundError, CheckpointError, DataError: a file is missing, damaged, or does not fit.
        """
        self._family, self._prompts = family, [_Prompt.of(entry) for entry in entries]
        read, load = cache(self._read), cache(self._load)
        adapters = [read(prompt.adapter) for prompt in self._prompts]
        pairs = [self._tokens(p, read(p.adapter), load(p.image_encoder)) for p in self._prompts]
        self.tokens = ImageTokens(*(torch.cat(parts, dim=1) for parts in zip(*pairs, strict=True)))
        place(family.device, next(family.denoiser.parameters()).dtype, *adapters)
        scales = [prompt.scale for prompt in self._prompts]
        self._attached = ImagePrompts(family.denoiser, list(zip(adapters, scales, strict=True)))

    def _read(self, file: Path) -> IPAdapter:
        return read_ip_adapter(file, self._family.denoiser).to(self._family.device)

    def _load(self, folder: Path) -> CLIPImageEncoder:
        encoder = CLIPImageEncoder.load(folder)
        place(self._family.device, torch.float32, encoder)
        return encoder

    @torch.inference_mode()
    def _tokens(self, prompt: _Prompt, adapter: IPAdapter, encoder: CLIPImageEncoder) -> tuple[Tensor, Tensor]:
        """The tokens of a picture, and those of none, in float32."""
        expect_fitting_encoder(adapter, encoder.model.config, prompt.image_encoder)
        pixels = open_picture(str(prompt.image), "--image-prompt", None)[None].to(self._family.device)
        features = ImageFeatures(encoder, adapter.kind)
        return adapter(features(pixels)), adapter(features.absent())

    def use_for(self, item: Item) -> None:
        """Set the scale for one picture, and all others with its settings."""
        self._attached.factor = item.sampling.image_scale

    @property
    def sources(self) -> dict[str, Path]:
        """The files, by their keys in a provenance."""
        return {
            image_prompt_source(number, role): getattr(prompt, role)
            for number, prompt in enumerate(self._prompts, start=1)
            for role in IMAGE_PROMPT_ROLES
        }

    @cached_property
    def provenance(self) -> list[dict[str, Any]]:
        """Scale and hashes of each image prompt, as JSON."""
        return [
            {
                "scale": prompt.scale,
                "image_sha256": file_sha256(prompt.image),
                "adapter_sha256": tensors_sha256([prompt.adapter]),
                "image_encoder_sha256": weights_sha256(prompt.image_encoder),
            }
            for prompt in self._prompts
        ]


def open_image_prompts(
    family: ImageGenerator, items: Sequence[Item], entries: Sequence[ImagePromptEntry]
) -> JobImagePrompts | None:
    """The image prompts of a job; None if it has none.

    Raises:
        UsageError: the model takes none, or `sampling.image_scale` has nothing to scale.
        InputNotFoundError, CheckpointError, DataError: as in `JobImagePrompts`.
    """
    if not entries and any(item.sampling.image_scale != 1.0 for item in items):
        raise UsageError("sampling.image_scale without an image prompt", remedy="give --image-prompt")
    if not entries:
        return None
    if not isinstance(family, Family) or not isinstance(family.denoiser, UNet2DConditionModel):
        raise UsageError("this model takes no image prompts", "their adapters are for U-Nets")
    if family.low_resolution is not None:
        raise UsageError("this model takes no image prompts", "it enlarges pictures", "give them to what generates")
    return JobImagePrompts(family, entries)
