"""scheduler_config.json of a diffusers folder: noise schedule, prediction type, and how its solver spaces timesteps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ldm_cli.errors import CheckpointError
from ldm_cli.formats.dynamic_shift import DynamicShift, read_dynamic_shift
from ldm_cli.formats.json_file import write_json
from ldm_cli.formats.model_source import read_model_json
from ldm_cli.formats.pipeline_folder import DIFFUSERS_VERSION, SCHEDULER_FILE

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
# Fields that would move the levels, or change a step, with the values that do neither.
_OFF = (False, None)
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("thresholding", "use_beta_sigmas", "use_dynamic_shifting", "use_lu_lambdas"), _OFF),
    **dict.fromkeys(("invert_sigmas", "shift_terminal", "stochastic_sampling", "trained_betas"), _OFF),
    "final_sigmas_type": ("zero",),
    "interpolation_type": ("linear",),
    "lambda_min_clipped": (-math.inf,),
    "timestep_scaling": (10.0,),
    "timestep_spacing": ("leading", "linspace", "trailing", None),
    "timestep_type": ("discrete",),
    "variance_type": (None, "fixed_small", "fixed_small_log"),
}
_NEUTRAL_BY_CLASS: dict[str, dict[str, tuple[Any, ...]]] = {
    "DPMSolverMultistepScheduler": {
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
        "solver_order": (2,),
        "solver_type": ("midpoint",),
    },
    "PNDMScheduler": {"skip_prk_steps": (True,), "timestep_spacing": ("leading",)},
    "UniPCMultistepScheduler": {
        "solver_order": (2,),
        "solver_type": ("bh2",),
        "predict_x0": (True,),
        "lower_order_final": (True,),
        "disable_corrector": ([], None),
        "solver_p": (None,),
    },
    **{name: {"use_karras_sigmas": _OFF, "use_exponential_sigmas": _OFF} for name in _FLOW_SCHEDULERS},
}
_POSITIVE = ("sigma_min", "sigma_max", "original_inference_steps")
# diffusers' defaults, for files that leave them out.
_DIFFUSION_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
}
_STABLE_DIFFUSION_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
_DEFAULTS_BY_CLASS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler"),
        _STABLE_DIFFUSION_BETAS,
    ),
    "LCMScheduler": {**_STABLE_DIFFUSION_BETAS, "beta_schedule": "scaled_linear"},
    "PNDMScheduler": {"skip_prk_steps": False},
}
_NO_THRESHOLD = {"dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_EXACT = ("StableDiffusionXL", "StableDiffusionUpscale", "StableUnCLIP")  # pipelines that honour `clip_sample`
_CLIPPING_BY_DEFAULT = ("DDIMScheduler", "DDPMScheduler")


@dataclass(frozen=True)
class SchedulerSettings:
    """What a scheduler_config.json says.

    Attributes:
        diffusion: the noise schedule and the prediction type, by the names of the file.
        timestep_spacing: None: each sampler's own default.
        steps_offset: added to the timesteps of `leading` spacing.
        set_alpha_to_one: DDIM's last step ends at ᾱ = 1 rather than ᾱ_0; None: not said.
        sigmas: levels with equal steps in σ^(1/7) or log σ, for samplers that step in σ; None: as `timestep_spacing`.
        sigma_min, sigma_max: the ends of these levels; None: those of the spacing, or of training.
        num_distilled: levels at which a latent consistency model was distilled.
        sampler: ours for the scheduler's class, by its name in recipes; the one to take where none is asked for.
        dynamic_shift: takes the place of the shift in `diffusion`, in sampling; None: that one is for all sizes.
        threshold: of models of pixels: `dynamic_thresholding_ratio`, the share of a picture's values that are kept, and
            `sample_max_value`, the most that it is divided by; None: no threshold.
    """

    diffusion: dict[str, Any]
    timestep_spacing: Literal["leading", "linspace", "trailing"] | None = None
    steps_offset: int = 1
    set_alpha_to_one: bool | None = None
    sigmas: Literal["karras", "exponential"] | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    num_distilled: int = 50
    sampler: str = "ddim"
    dynamic_shift: DynamicShift | None = None
    threshold: dict[str, float] | None = None

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


def write_scheduler(folder: Path, settings: SchedulerSettings, scheduler_class: str) -> None:
    """Write a complete scheduler/scheduler_config.json.

    Args:
        settings: what the file says.
        scheduler_class: of the file: `settings.scheduler_class`, FlowMatchEulerDiscreteScheduler for a flow, or
            DDPMScheduler for pixels.

    Raises:
        StorageError: writing failed.
    """
    content: dict[str, Any] = {"_class_name": scheduler_class, "_diffusers_version": DIFFUSERS_VERSION}
    if scheduler_class in _FLOW_SCHEDULERS:
        content["num_train_timesteps"] = settings.diffusion["num_train_timesteps"]
        content["shift"] = settings.diffusion["flow_shift"]
        if settings.dynamic_shift is not None:
            content |= {"use_dynamic_shifting": True, **vars(settings.dynamic_shift)}
    elif scheduler_class == "DDPMScheduler":
        content |= _shared_fields(settings) | {"clip_sample": False, "variance_type": "fixed_small"}
    else:
        content |= _solver_fields(settings)
    (folder / SCHEDULER_FILE).parent.mkdir(parents=True, exist_ok=True)
    write_json(folder / SCHEDULER_FILE, content)


def _shared_fields(settings: SchedulerSettings) -> dict[str, Any]:
    """The fields that the classes of these solvers have in common."""
    return {
        **settings.diffusion,
        "trained_betas": None,
        "steps_offset": settings.steps_offset,
        "thresholding": settings.threshold is not None,
        **_NO_THRESHOLD,
        **(settings.threshold or {}),
        "timestep_spacing": settings.timestep_spacing or "leading",
    }


def _solver_fields(settings: SchedulerSettings) -> dict[str, Any]:
    """The fields of a DDIMScheduler, or of a flow's UniPCMultistepScheduler."""
    content = _shared_fields(settings)
    if settings.is_flow:
        return {**content, "use_flow_sigmas": True}
    set_alpha_to_one = True if settings.set_alpha_to_one is None else settings.set_alpha_to_one
    return {**content, "clip_sample": False, "clip_sample_range": 1.0, "set_alpha_to_one": set_alpha_to_one}


def read_scheduler(folder: Path, pipeline: str = "StableDiffusionPipeline") -> SchedulerSettings:
    """What scheduler/scheduler_config.json of a pipeline folder says, for any solver of ours.

    As in the pipelines of Stable Diffusion 1 and 2, `clip_sample` is ignored and `steps_offset` is 1 whatever the file
    says; those of Stable Diffusion XL, its upscaler and Stable unCLIP honour both, and clipping is refused. Those of IF
    honour both, and thresholding; a learned variance is read as the fixed one.

    Args:
        pipeline: class of the pipeline in diffusers.

    Raises:
        InputNotFoundError: there is no such file.
        CheckpointError: its class, or a field that is not neutral, is not supported (its own betas, thresholding, …).
    """
    file = folder / SCHEDULER_FILE
    content = read_model_json(file)
    found = content.get("_class_name")
    if not isinstance(found, str) or found not in _SAMPLERS:
        raise CheckpointError(f"cannot use '{file}'", f"scheduler {found!r} is not supported", "use a DDIMScheduler's")
    content = {**_DEFAULTS_BY_CLASS.get(found, {}), **content}
    is_exact, is_of_pixels = pipeline.startswith(_EXACT), pipeline.startswith("IF")
    if is_exact:
        content = {"clip_sample": found in _CLIPPING_BY_DEFAULT, **content}
    if found in _FLOW_SCHEDULERS:  # they say nothing of the prediction, always a velocity, and call its shift so
        content = {**content, "prediction_type": "flow_prediction", "flow_shift": content.get("shift", 1.0)}
    neutral = _neutral_fields(found, content, pipeline)
    refused = [name for name, values in neutral.items() if name in content and content[name] not in values]
    numbers = {name: content[name] for name in _POSITIVE if content.get(name) is not None}
    refused += [n for n, x in numbers.items() if not (isinstance(x, int | float) and 0 < x < math.inf)]
    if not refused and numbers.get("sigma_min", 0) >= numbers.get("sigma_max", math.inf):
        refused = ["sigma_min", "sigma_max"]
    if refused:
        named = ", ".join(f"{name}={content[name]!r}" for name in refused)
        raise CheckpointError(f"cannot use '{file}'", f"{named} is not supported", "correct the file")
    return SchedulerSettings(
        diffusion=_diffusion(content),
        timestep_spacing=content.get("timestep_spacing"),
        steps_offset=content.get("steps_offset", 0) if is_exact or is_of_pixels else 1,
        set_alpha_to_one=bool(content["set_alpha_to_one"]) if "set_alpha_to_one" in content else None,
        sigmas=_sigmas(content),
        sigma_min=content.get("sigma_min"),
        sigma_max=content.get("sigma_max"),
        num_distilled=content.get("original_inference_steps") or 50,
        sampler=_sampler(found, content),
        dynamic_shift=read_dynamic_shift(content, file) if content.get("use_dynamic_shifting") else None,
        threshold=_threshold(content, found) if is_of_pixels else None,
    )


def _neutral_fields(scheduler_class: str, content: Mapping[str, Any], pipeline: str) -> dict[str, tuple[Any, ...]]:
    """The fields that must have one of some values, by what else the file and the pipeline are."""
    neutral = {**_NEUTRAL, **_NEUTRAL_BY_CLASS.get(scheduler_class, {})}
    if scheduler_class == "DPMSolverMultistepScheduler" and content.get("algorithm_type") == "sde-dpmsolver++":
        neutral["solver_order"] = (2, 3)
    if "Inpaint" in pipeline:
        neutral.pop("skip_prk_steps", None)
    if pipeline.startswith("IF"):
        neutral |= {"variance_type": (*neutral["variance_type"], "learned_range"), "clip_sample_range": (1.0,)}
        neutral.pop("thresholding")
    if pipeline.startswith(("LatentConsistency", *_EXACT)):
        neutral["clip_sample"] = _OFF
    if scheduler_class in _FLOW_SCHEDULERS:
        if pipeline.startswith("StableDiffusion3"):
            neutral.pop("use_dynamic_shifting")
    elif scheduler_class != "UniPCMultistepScheduler" or content.get("prediction_type") != "flow_prediction":
        neutral["use_flow_sigmas"] = _OFF
    if content.get("use_karras_sigmas"):
        neutral["use_exponential_sigmas"] = _OFF
    return neutral


def _threshold(content: Mapping[str, Any], scheduler_class: str) -> dict[str, float] | None:
    """See `SchedulerSettings`; clipping is a division by no more than 1."""
    if content.get("thresholding"):
        return {name: content.get(name, default) for name, default in _NO_THRESHOLD.items()}
    clips = content.get("clip_sample", scheduler_class in _CLIPPING_BY_DEFAULT)
    return {"dynamic_thresholding_ratio": 1.0, "sample_max_value": 1.0} if clips else None


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
    found["rescale_betas_zero_snr"] = found["rescale_betas_zero_snr"] or False  # null, as in diffusers
    if found["prediction_type"] == "flow_prediction":
        found["flow_shift"] = content.get("flow_shift", 1.0)
    return found


def _sigmas(content: Mapping[str, Any]) -> Literal["karras", "exponential"] | None:
    if content.get("use_karras_sigmas"):
        return "karras"
    return "exponential" if content.get("use_exponential_sigmas") else None
