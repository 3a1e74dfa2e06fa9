"""Pictures enlarged by diffusion of their pixels, as in Imagen (Saharia et al. 2022, arXiv:2205.11487) and IF."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from ldm_cli.errors import CheckpointError
from ldm_cli.families.latent_diffusion import pipeline_of
from ldm_cli.families.low_resolution import LowResolution, read_noising, write_noising
from ldm_cli.families.pixel_diffusion import PixelDiffusion, opened
from ldm_cli.families.pixel_diffusion import outline_folder as outline_pixels
from ldm_cli.formats.model_source import read_model_json
from ldm_cli.formats.pipeline_folder import INDEX_NAME

NOISING = "image_noising_scheduler"
NOISING_BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "squaredcos_cap_v2",
}
_SETTINGS = {"upscale_factor": 4, "max_noise_level": 999, "noise_level": 250}
"""Settings of the index, ours, with the values of folders that lack them."""


@dataclass(frozen=True, eq=False)
class PixelUpscale(PixelDiffusion):
    """A model that enlarges pictures; `save` writes a folder that `IFSuperResolutionPipeline.from_pretrained` opens."""

    pipelines: ClassVar[tuple[str, ...]] = ("IFSuperResolutionPipeline",)

    def save_companions(self, folder: Path) -> None:
        """Write all but the U-Net; errors as in `save`."""
        low = self.low_resolution
        assert low is not None
        write_noising(folder, NOISING, low.diffusion)
        values = (low.factor, low.max_noise_level, low.noise_level)
        self.save_parts(folder, {NOISING: "DDPMScheduler"}, dict(zip(_SETTINGS, values, strict=True)))


def is_mine(folder: Path) -> bool:
    """Whether the folder holds a pipeline that enlarges pixels."""
    return pipeline_of(folder) in PixelUpscale.pipelines


def open_folder(folder: Path, device: torch.device | str, precision: str, *, compiled: bool = False) -> PixelUpscale:
    """Read a folder; see `open_family`."""
    return opened(PixelUpscale, folder, device, precision, compiled, _low_resolution(folder))


def outline_folder(folder: Path) -> dict[str, nn.Module]:
    """See `outline_family`."""
    _low_resolution(folder)
    return outline_pixels(folder, enlarges=True)


def _low_resolution(folder: Path) -> LowResolution:
    index = read_model_json(folder / INDEX_NAME)
    found = {name: index.get(name, default) for name, default in _SETTINGS.items()}
    if not all(isinstance(value, int) and 0 <= value < 1000 for value in found.values()) or not found["upscale_factor"]:
        raise CheckpointError(f"cannot use '{folder / INDEX_NAME}'", f"{found}, expected numbers up to 999")
    factor, highest, level = found.values()
    return LowResolution(factor, factor, highest, min(highest, level), read_noising(folder, NOISING))
