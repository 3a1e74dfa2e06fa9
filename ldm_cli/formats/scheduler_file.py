"""scheduler_config.json of a diffusers folder: noise schedule, prediction type, and how its solver spaces timesteps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ldm_cli.errors import CheckpointError
from ldm_cli.formats.json_file import read_json, write_json

SCHEDULER_FILE = Path("scheduler") / "scheduler_config.json"
DIFFUSERS_VERSION = "0.42.1"
"""The release of diffusers whose files we write."""

# Our sampler for each scheduler: the same method, for the last three the nearest one.
_SAMPLERS = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "DPMSolverSDEScheduler": "dpmpp_sde",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "EulerDiscreteScheduler": "euler",
    "FlowMatchEulerDiscreteScheduler": "flow_euler",
    "FlowMatchHeunDiscreteScheduler": "flow_heun",
    "HeunDiscreteScheduler": "heun",
    "KDPM2DiscreteScheduler": "dpm2",
    "LCMScheduler": "lcm",
    "LMSDiscreteScheduler": "lms",
    "PNDMScheduler": "pndm",
    "UniPCMultistepScheduler": "unipc",
    "DEISMultistepScheduler": "dpmpp_2m",
    "DPMSolverSinglestepScheduler": "dpmpp_2m",
    "KDPM2AncestralDiscreteScheduler": "dpmpp_2s_ancestral",
}
_FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
# What would move the levels, or change what the network says.
_UNSUPPORTED = ("trained_betas", "thresholding", "use_dynamic_shifting", "use_beta_sigmas", "use_lu_lambdas")
_UNSUPPORTED_IN_FLOW = (
    *("invert_sigmas", "shift_terminal", "stochastic_sampling"),
    *("use_karras_sigmas", "use_exponential_sigmas"),
)
# diffusers' defaults, for files that leave them out.
_DIFFUSION_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
}


@dataclass(frozen=True)
class SchedulerSettings:
    """What a scheduler_config.json says.

    Attributes:
        diffusion: the noise schedule and the prediction type, by the names of the file.
        timestep_spacing: None: each sampler's own default.
        steps_offset: added to the timesteps of `leading` spacing.
        set_alpha_to_one: DDIM's last step ends at ᾱ = 1 rather than ᾱ_0; None: not said.
        sigmas: levels with equal steps in σ^(1/7) or log σ, for samplers that step in σ; None: as `timestep_spacing`.
        sampler: ours for the scheduler's class, by its name in recipes; the one to take where none is asked for.
    """

    diffusion: dict[str, Any]
    timestep_spacing: Literal["leading", "linspace", "trailing"] | None = None
    steps_offset: int = 1
    set_alpha_to_one: bool | None = None
    sigmas: Literal["karras", "exponential"] | None = None
    sampler: str = "ddim"

    @property
    def is_flow(self) -> bool:
        """Whether the levels are those of flow matching."""
        return bool(self.diffusion.get("prediction_type") == "flow_prediction")

    @property
    def scheduler_class(self) -> str:
        """The class of diffusers that we write: the first is the plainest, the second one that knows flows."""
        return "UniPCMultistepScheduler" if self.is_flow else "DDIMScheduler"


def our_settings(diffusion: Mapping[str, Any]) -> SchedulerSettings:
    """The settings of a model that we train: as Stable Diffusion 1, or with zero SNR as Lin et al. 2023.

    Args:
        diffusion: a noise schedule and prediction type; other keys are left out.
    """
    kept = _diffusion(diffusion)
    # Only `trailing` visits the last level, which is the point of zero SNR.
    # A flow has no first level to end at, and its scheduler's file no word for it.
    to_one = None if kept["prediction_type"] == "flow_prediction" else False
    settings = SchedulerSettings(kept, "trailing" if kept["rescale_betas_zero_snr"] else "leading", 1, to_one)
    return replace(settings, sampler="flow_euler" if settings.is_flow else "ddim")


def write_scheduler(folder: Path, settings: SchedulerSettings) -> None:
    """Write scheduler/scheduler_config.json as a complete DDIMScheduler's, or of a flow as a UniPCMultistepScheduler's.

    Raises:
        StorageError: writing failed.
    """
    content = {
        "_class_name": settings.scheduler_class,
        "_diffusers_version": DIFFUSERS_VERSION,
        **settings.diffusion,
        "trained_betas": None,
        "steps_offset": settings.steps_offset,
        "thresholding": False,
        "dynamic_thresholding_ratio": 0.995,
        "sample_max_value": 1.0,
        "timestep_spacing": settings.timestep_spacing or "leading",
    }
    if settings.is_flow:
        content["use_flow_sigmas"] = True
    else:
        set_alpha_to_one = True if settings.set_alpha_to_one is None else settings.set_alpha_to_one
        content |= {"clip_sample": False, "clip_sample_range": 1.0, "set_alpha_to_one": set_alpha_to_one}
    (folder / SCHEDULER_FILE).parent.mkdir(parents=True, exist_ok=True)
    write_json(folder / SCHEDULER_FILE, content)


def read_scheduler(folder: Path) -> SchedulerSettings:
    """What scheduler/scheduler_config.json of a Stable Diffusion folder says, for any solver of ours.

    `clip_sample` is ignored and `steps_offset` is 1 whatever the file says: so does StableDiffusionPipeline.

    Raises:
        InputNotFoundError: there is no such file.
        CheckpointError: its class, or something that it asks for, is not supported (its own betas, thresholding, …).
    """
    file = folder / SCHEDULER_FILE
    content = read_json(file)
    found = content.get("_class_name")
    if found not in _SAMPLERS:
        raise CheckpointError(f"cannot use '{file}'", f"scheduler {found!r} is not supported", "use a DDIMScheduler's")
    refused = list(_UNSUPPORTED)
    if found in _FLOW_SCHEDULERS:
        refused += _UNSUPPORTED_IN_FLOW
        # These classes say nothing of the prediction, which is always a velocity, and call its shift so.
        content = {**content, "prediction_type": "flow_prediction", "flow_shift": content.get("shift", 1.0)}
    elif content.get("prediction_type") != "flow_prediction":
        refused.append("use_flow_sigmas")
    unsupported = [name for name in refused if content.get(name)]
    if unsupported:
        raise CheckpointError(f"cannot use '{file}'", f"{', '.join(unsupported)} is not supported")
    return SchedulerSettings(
        diffusion=_diffusion(content),
        timestep_spacing=content.get("timestep_spacing"),
        set_alpha_to_one=content.get("set_alpha_to_one"),
        sigmas=_sigmas(content),
        sampler=_sampler(found, content),
    )


def _sampler(scheduler_class: str, content: Mapping[str, Any]) -> str:
    """Our sampler for a class; of one class there are solvers of the ODE and of the SDE.

    A multistep class on a flow gives Euler's method: its levels there are not ours, and we write it for its name alone.
    """
    if content.get("use_flow_sigmas"):
        return "flow_euler"
    sampler = _SAMPLERS[scheduler_class]
    if sampler != "dpmpp_2m" or not str(content.get("algorithm_type")).startswith("sde-"):
        return sampler
    return "dpmpp_3m_sde" if content.get("solver_order") == 3 else "dpmpp_2m_sde"


def _diffusion(content: Mapping[str, Any]) -> dict[str, Any]:
    """The noise schedule and prediction type, and for a flow its shift."""
    found = {name: content.get(name, default) for name, default in _DIFFUSION_DEFAULTS.items()}
    if found["prediction_type"] == "flow_prediction":
        found["flow_shift"] = content.get("flow_shift", 1.0)
    return found


def _sigmas(content: Mapping[str, Any]) -> Literal["karras", "exponential"] | None:
    if content.get("use_karras_sigmas"):
        return "karras"
    return "exponential" if content.get("use_exponential_sigmas") else None
