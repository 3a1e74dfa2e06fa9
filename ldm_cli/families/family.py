"""What belongs to one text-to-image model: its networks, its diffusion process, how it is saved.

Each kind of model has a file here with a subclass of `Family`.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from ldm_cli.core.codec import Codec
from ldm_cli.core.condition import Condition
from ldm_cli.core.cpu import tune_for_cpu
from ldm_cli.core.diffusion.config import DiffusionConfig
from ldm_cli.core.diffusion.process import Process, process_of
from ldm_cli.core.models.t5_encoder import T5EncoderModel
from ldm_cli.families.low_resolution import LowResolution
from ldm_cli.families.prompt_chunks import PromptReading
from ldm_cli.formats.model_folder import read_config
from ldm_cli.formats.model_source import weights_sha256
from ldm_cli.formats.pipeline_folder import TEXT_ENCODER, TEXT_ENCODER_2, TEXT_ENCODER_3, VAE
from ldm_cli.formats.save_model import save_model
from ldm_cli.formats.scheduler_file import SchedulerSettings


class Encoder(Protocol):
    """Prompts to the conditions that a denoiser takes."""

    @property
    def key(self) -> dict[str, str]:
        """What decides the conditions (hashes of weights, configuration and tokenizer), by names that users know."""

    def check(self, reading: PromptReading) -> None:
        """Raise UsageError for a `clip_skip` that the encoder does not have."""

    def num_chunks(self, prompt: str, reading: PromptReading) -> int:
        """In how many chunks a prompt is encoded: 1, unless it is `long`."""

    def encode_prompts(
        self, prompts: Sequence[str], reading: PromptReading, *, num_chunks: int, warn: Callable[[str], None]
    ) -> Condition:
        """B prompts in one batch: B rows.

        Args:
            prompts: the texts.
            reading: how they become conditions.
            num_chunks: chunks of each row: those of a prompt, then empty ones; what has no room is cut.
            warn: is called with a message for each prompt that is cut.
        """


class ImageGenerator(ABC):
    """What text-to-image models of every kind have in common; subclasses are frozen dataclasses."""

    codec: Codec
    """Images to latents and back."""
    folder: Path | None
    """Where it was read; None if it was not."""
    is_compiled: bool
    """Whether its networks are compiled."""
    components: ClassVar[tuple[str, ...]]
    """Subfolders that hold weights, that of the network that is trained first."""

    @cached_property
    def weights_sha256(self) -> dict[str, str]:
        """Hex sha256 of each component's tensors; empty if the model was not read from a folder."""
        return {} if self.folder is None else {name: weights_sha256(self.folder / name) for name in self.components}

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the networks are."""

    @property
    @abstractmethod
    def sample_size(self) -> tuple[int | None, int | None]:
        """Height and width of the latents that the model was trained at; None where its files do not say."""

    @property
    def takes_sizes(self) -> bool:
        """Whether sizes of the picture follow the pooled text: see `Condition.with_sizes`."""
        return False

    @property
    def guidance_width(self) -> int | None:
        """Width of the guidance scale's embedding, for a denoiser that was distilled with guidance; else None."""
        return None

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write a folder that `open_family` opens.

        Raises:
            StorageError, OutputError: writing failed.
        """


@dataclass(frozen=True, eq=False)
class Family(ImageGenerator):
    """A text-to-image model with a denoiser.

    Attributes:
        denoiser: a `Denoiser` of latents.
        encoder: prompts to conditions, in the type of the denoiser.
        settings: process, prediction type, and the sampler to take where none is asked for.
        folder: where it was read; None if it was not.
        low_resolution: what a denoiser that enlarges pictures expects of them; None: it does not.
    """

    denoiser: nn.Module
    codec: Codec
    encoder: Encoder
    settings: SchedulerSettings
    folder: Path | None = None
    is_compiled: bool = False
    low_resolution: LowResolution | None = None

    @cached_property
    def process(self) -> Process:
        """The noise levels that the denoiser was trained at."""
        return process_of(DiffusionConfig.from_mapping(self.settings.diffusion))

    def process_at(self, latent_size: tuple[int, int]) -> Process:
        """The noise levels to sample at, for latents of a height and width."""
        return self.process

    def num_edit_steps(self, strength: float, num_steps: int) -> int:
        """How many of the steps change a picture.

        Args:
            strength: share of the steps in [0, 1]; rounded down as in the pipelines of Stable Diffusion.
            num_steps: all steps.
        """
        return int(strength * num_steps)

    @property
    def sample_size(self) -> tuple[int | None, int | None]:
        """As the denoiser's `sample_size` says."""
        config: Any = self.denoiser.config
        return config.sample_size if isinstance(config.sample_size, tuple) else (config.sample_size, config.sample_size)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks, by what users call them."""
        codec = {VAE: self.codec} if isinstance(self.codec, nn.Module) else {}
        return {self.components[0]: self.denoiser, **codec, **text_networks(getattr(self.encoder, "models", ()))}

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.denoiser.parameters()).device

    @property
    def patch_size(self) -> int:
        """What the sides of the latents are multiples of."""
        return 1

    @property
    def largest_size(self) -> int | None:
        """The longest side of the latents that the denoiser takes; None: any."""
        return None

    @property
    def takes_mask(self) -> bool:
        """Whether the denoiser fills masks: `concat` is then the mask, followed by the masked latents."""
        return False

    def save(self, folder: Path) -> None:
        """See `ImageGenerator`."""
        self.save_denoiser(folder)
        self.save_companions(folder)

    def save_denoiser(self, folder: Path) -> None:
        """Write the denoiser's part of the folder; errors as in `save`."""
        config: Any = self.denoiser.config
        save_model(folder / self.components[0], self.denoiser.state_dict(), config.to_hugging_face())

    @abstractmethod
    def save_companions(self, folder: Path) -> None:
        """Write all but the denoiser's part of the folder; errors as in `save`."""


def place(device: torch.device | str, dtype: torch.dtype, *modules: nn.Module, channels_last: bool = True) -> None:
    """Freeze modules and bring them to the device on which they compute, and to its type, memory order and kernels.

    Args:
        dtype: of their weights.
        modules: not to be trained.
        channels_last: NHWC order, which tensor cores and CPUs prefer.
    """
    for module in modules:
        module.requires_grad_(False).eval()
        module.to(device=device, dtype=dtype)
        if channels_last:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        tune_for_cpu(module)


def text_networks(models: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """The networks of an encoder by component: T5 beside CLIP is the third, even without a second."""
    second = TEXT_ENCODER_3 if len(models) == 2 and isinstance(models[1], T5EncoderModel) else TEXT_ENCODER_2
    return dict(zip((TEXT_ENCODER, second, TEXT_ENCODER_3), models, strict=False))


def model_sha256(folder: Path, ignored: Collection[str] = ()) -> str:
    """Hex sha256 of what a model computes: its weights and config.json, without `ignored` fields; errors as in
    `read_config` and `weights_sha256`."""
    config = {k: v for k, v in read_config(folder).items() if not k.startswith("_") and k not in ignored}
    return hashlib.sha256((weights_sha256(folder) + json.dumps(config, sort_keys=True)).encode()).hexdigest()
