"""The scheduler files of an unCLIP model beside that of its decoder: of the prior, and of the noise on embeddings.

Both are read as DDPM, which clips its prediction of x_0.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ldm_cli.errors import CheckpointError
from ldm_cli.formats.json_file import write_json
from ldm_cli.formats.model_source import read_model_json
from ldm_cli.formats.pipeline_folder import DIFFUSERS_VERSION, SCHEDULER_FILE
from ldm_cli.formats.scheduler_file import SchedulerSettings

Kind = Literal["DDPMScheduler", "UnCLIPScheduler"]
_DEFAULTS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": {"beta_schedule": "linear", "timestep_spacing": "leading", "variance_type": "fixed_small"},
    "UnCLIPScheduler": {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "linspace"},
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "thresholding": (False, None),
    "trained_betas": (None,),
    "variance_type": ("fixed_small", "fixed_small_log"),
}


@dataclass(frozen=True)
class ClippingScheduler:
    """What such a file says.

    Attributes:
        settings: process, prediction type and timesteps, for the sampler `ddpm`.
        limit: largest |x_0| of a prediction; None: any.
    """

    settings: SchedulerSettings
    limit: float | None

    @classmethod
    def ours(cls, diffusion: dict[str, Any], limit: float = 10.0) -> ClippingScheduler:
        """That of a prior that we train: from pure noise on, and clipped as Kandinsky's.

        Args:
            diffusion: a noise schedule and prediction type; other keys are left out.
            limit: as the attribute.
        """
        names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
        kept = {name: diffusion[name] for name in names} | {"rescale_betas_zero_snr": False}
        return cls(SchedulerSettings(kept, "linspace", 0, sampler="ddpm"), limit)

    def write(self, folder: Path, kind: Kind) -> None:
        """Write the file of a class of diffusers; the folder is created.

        Raises:
            StorageError: writing failed.
        """
        settings = self.settings
        clipping = {"clip_sample": self.limit is not None, "clip_sample_range": self.limit or 1.0}
        content: dict[str, Any] = {"_class_name": kind, "_diffusers_version": DIFFUSERS_VERSION, **clipping}
        if kind == "UnCLIPScheduler":
            content |= {n: settings.diffusion[n] for n in ("num_train_timesteps", "beta_schedule", "prediction_type")}
        else:
            content |= {
                **settings.diffusion,
                "trained_betas": None,
                "steps_offset": settings.steps_offset,
                "thresholding": False,
                "dynamic_thresholding_ratio": 0.995,
                "sample_max_value": 1.0,
                "timestep_spacing": settings.timestep_spacing,
            }
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / SCHEDULER_FILE.name, content | {"variance_type": "fixed_small_log"})

    @classmethod
    def read(cls, folder: Path) -> ClippingScheduler:
        """What the file in a folder says.

        Raises:
            InputNotFoundError: there is none.
            CheckpointError: its class, or a field that is not neutral, is not supported.
        """
        file = folder / SCHEDULER_FILE.name
        content: dict[str, Any] = read_model_json(file)
        kind = content.get("_class_name")
        if kind not in _DEFAULTS:
            remedy = f"use a file of {' or '.join(_DEFAULTS)}"
            raise CheckpointError(f"cannot use '{file}'", f"scheduler {kind!r} is not supported", remedy)
        defaults: dict[str, Any] = {"clip_sample": True, "clip_sample_range": 1.0, "prediction_type": "epsilon"}
        content = defaults | _DEFAULTS[kind] | content
        refused = [name for name, values in _NEUTRAL.items() if content.get(name, values[0]) not in values]
        if kind == "UnCLIPScheduler" and content["beta_schedule"] != "squaredcos_cap_v2":
            refused.append("beta_schedule")
        if refused:
            named = ", ".join(f"{name}={content[name]!r}" for name in refused)
            raise CheckpointError(f"cannot use '{file}'", f"{named} is not supported", "correct the file")
        names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
        diffusion = {"beta_start": 0.0001, "beta_end": 0.02} | {n: content[n] for n in names if n in content}
        diffusion["rescale_betas_zero_snr"] = bool(content.get("rescale_betas_zero_snr"))
        offset = content.get("steps_offset", 0)
        settings = SchedulerSettings(diffusion, content["timestep_spacing"], offset, sampler="ddpm")
        return cls(settings, content["clip_sample_range"] if content["clip_sample"] else None)
