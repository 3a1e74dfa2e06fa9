"""How a denoiser that enlarges pictures is given the small one: as further channels, under noise of a known level.

Noise on it hides the flaws that it may have, and lets the denoiser make up details (Ho et al. 2021, arXiv:2106.15282,
section 4.2; Rombach et al. 2022, arXiv:2112.10752, section 4.4).

Letters: B batch; h w size of the small picture, H W of the latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from ldm_cli.config import causes
from ldm_cli.core.condition import Condition
from ldm_cli.core.diffusion.config import DiffusionConfig
from ldm_cli.core.diffusion.process import Process, process_of
from ldm_cli.core.window import Window
from ldm_cli.errors import CheckpointError
from ldm_cli.formats.json_file import write_json
from ldm_cli.formats.model_source import read_model_json
from ldm_cli.formats.pipeline_folder import DIFFUSERS_VERSION

_SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler")
_FIELDS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
_DEFAULTS = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}


@dataclass(frozen=True)
class LowResolution:
    """What a denoiser that enlarges pictures expects of them.

    Attributes:
        factor: pixels of the result per pixel of the small picture, along each side.
        latent_factor: latents per pixel of the small picture: with 1 it is joined to them as it is; else it is enlarged
            bilinearly first, so that corners stay corners.
        max_noise_level: highest level of the noise.
        noise_level: the level to take where none is asked for.
        diffusion: the levels of the noise, by the fields of a scheduler's file.
    """

    factor: int
    latent_factor: int
    max_noise_level: int
    noise_level: int
    diffusion: Mapping[str, Any]

    @cached_property
    def process(self) -> Process:
        """The levels of the noise."""
        return process_of(DiffusionConfig.from_mapping(dict(self.diffusion)))

    def conditioned(
        self, condition: Condition, pictures: Tensor, noise: Tensor, level: Tensor, window: Window
    ) -> Condition:
        """The condition with a part of the small pictures and the level of its noise.

        Args:
            condition: B rows, without `pooled` and `concat`.
            pictures: [B, 3, h, w] in [−1, 1].
            noise: standard normal [B, 3, H', W'], of the window.
            level: int64 [B], 0 … `max_noise_level`.
            window: the part of the latents, H' × W', that the denoiser sees.
        """
        size = (pictures.shape[-2] * self.latent_factor, pictures.shape[-1] * self.latent_factor)
        part = enlarged(pictures.float(), size, window)
        a, b, _ = self.process.at((level.double() + 0.5) / self.process.num_timesteps)
        signal, spread = (scale.to(part.dtype).view(-1, 1, 1, 1) for scale in (a, b))
        return replace(condition, concat=signal * part + spread * noise, pooled=level)


def enlarged(pictures: Tensor, size: tuple[int, int], window: Window) -> Tensor:
    """A part of pictures [B, C, h, w] enlarged to `size`, bilinearly, the corner pixels' centres at the corners.

    Returns:
        [B, C, H', W'], as torch's `interpolate(align_corners=True)` of the whole has it there.
    """
    result = pictures
    lines = ((-2, window.top, window.height), (-1, window.left, window.width))
    for (dimension, start, count), new in zip(lines, size, strict=True):
        old = pictures.shape[dimension]
        place = torch.arange(start, start + count, dtype=torch.float32, device=pictures.device)
        place = place * ((old - 1) / max(1, new - 1))
        low = place.floor().long().clamp(0, max(0, old - 2))
        weight = (place - low).view(-1, *[1] * (-1 - dimension))
        before = result.index_select(dimension, low)
        result = before.lerp(result.index_select(dimension, (low + 1).clamp(max=old - 1)), weight)
    return result


def write_noising(folder: Path, name: str, diffusion: Mapping[str, Any]) -> None:
    """Write the levels of the noise as the scheduler of a subfolder.

    Raises:
        StorageError: writing failed.
    """
    (folder / name).mkdir(parents=True, exist_ok=True)
    content = {"_class_name": "DDPMScheduler", "_diffusers_version": DIFFUSERS_VERSION}
    write_json(folder / name / "scheduler_config.json", content | {field: diffusion[field] for field in _FIELDS})


def read_noising(folder: Path, name: str) -> dict[str, Any]:
    """The levels of the noise in a subfolder.

    Raises:
        InputNotFoundError, CheckpointError: the file is missing, or asks for something that is not implemented.
    """
    file = folder / name / "scheduler_config.json"
    content = read_model_json(file)
    found = {field: content.get(field, default) for field, default in _DEFAULTS.items()}
    problems = [] if content.get("_class_name") in _SCHEDULERS else [f"scheduler {content.get('_class_name')!r}"]
    problems += [f"{field}={content[field]!r}" for field in ("trained_betas",) if content.get(field) is not None]
    try:
        DiffusionConfig.from_mapping(found)
    except ValidationError as error:
        problems += causes(error)
    if problems:
        raise CheckpointError(f"cannot use '{file}'", "; ".join(problems) + ": not supported")
    return found
