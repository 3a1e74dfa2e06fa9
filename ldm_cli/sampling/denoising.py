"""From initial noise to latents: the sampler that a configuration names, on the levels that it names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor

from ldm_cli.core.diffusion import exponential_samplers, samplers
from ldm_cli.core.diffusion.samplers import Denoiser, NoiseSource
from ldm_cli.core.diffusion.schedule import NoiseSchedule
from ldm_cli.core.diffusion.timesteps import (
    Spacing,
    Trajectory,
    ddim_trajectory,
    ddpm_trajectory,
    dpmpp_trajectory,
    euler_trajectory,
    lcm_trajectory,
)
from ldm_cli.errors import UsageError
from ldm_cli.formats.pipeline_folder import SchedulerSettings
from ldm_cli.sampling.config import SamplerName, SamplingConfig

_WITH_ETA: dict[SamplerName, tuple[Callable[[Denoiser, Tensor, Trajectory, NoiseSource, float], Tensor], float]] = {
    "ddim": (samplers.euler, 0.0),
    "euler_ancestral": (samplers.euler, 1.0),
    "dpmpp_2m_sde": (exponential_samplers.dpmpp_2m, 1.0),
    "dpmpp_2s_ancestral": (exponential_samplers.dpmpp_2s, 1.0),
    "dpmpp_sde": (exponential_samplers.dpmpp_sde, 1.0),
    "dpmpp_3m_sde": (exponential_samplers.dpmpp_3m, 1.0),
}
"""Samplers whose noise can be chosen, and how much they add if it is not."""
_WITH_NOISE: dict[SamplerName, Callable[[Denoiser, Tensor, Trajectory, NoiseSource], Tensor]] = {
    "ddpm": lambda denoise, x, path, noise: samplers.euler(denoise, x, path, noise, 1.0),
    "euler": samplers.euler,
    "flow_euler": samplers.euler,
    "dpmpp_2m": exponential_samplers.dpmpp_2m,
    "lcm": samplers.lcm,
}
_DETERMINISTIC: dict[SamplerName, Callable[[Denoiser, Tensor, Trajectory], Tensor]] = {
    "heun": samplers.heun,
    "flow_heun": samplers.heun,
    "dpm2": samplers.dpm2,
    "lms": samplers.lms,
    "unipc": exponential_samplers.unipc,
    "pndm": samplers.pndm,
}
_DPMPP_GRID = ("dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "unipc")
_DISCRETE_GRID = ("ddpm", "ddim", "pndm", "lcm")


@dataclass(frozen=True)
class Start:
    """Where sampling begins when it does not begin at pure noise (Meng et al. 2022, SDEdit, arXiv:2108.01073).

    Attributes:
        latents: what is kept of, [B, …] like the noise.
        strength: share of the steps that are taken, 0 … 1: the last ⌊strength · steps⌋; 1 is the plain path from
            pure noise, which forgets `latents`, and 0 takes no step and returns them.
    """

    latents: Tensor
    strength: float


def denoise(
    model: Denoiser,
    noise: Tensor,
    schedule: NoiseSchedule,
    settings: SchedulerSettings,
    config: SamplingConfig,
    step_noise: NoiseSource,
    start: Start | None = None,
) -> Tensor:
    """Draw x_0 for standard normal noise [B, …], of its shape and type.

    Args:
        model: gives x_0, guided.
        noise: initial noise, standard normal.
        schedule: the levels the network was trained at.
        settings: what the model's scheduler file says beside that.
        config: sampler, steps, η, and the spacing if it is not to be the model's.
        step_noise: fresh noise of every step.
        start: latents to begin with, noised to the level that their strength names; None: pure noise.

    Raises:
        UsageError: more steps than the network has levels.
    """
    path = plan(schedule, settings, config)
    x = path.start_scale * noise
    if start is not None and start.strength < 1.0:
        path = path.last(int(start.strength * config.steps))
        if len(path) == 0:
            return start.latents
        first = path.steps[0][0]
        x = first.signal * start.latents + first.noise * noise
    name = sampler_of(settings, config)
    if name in _WITH_ETA:
        sampler, eta = _WITH_ETA[name]
        return sampler(model, x, path, step_noise, eta if config.eta is None else config.eta)
    if name in _WITH_NOISE:
        return _WITH_NOISE[name](model, x, path, step_noise)
    return _DETERMINISTIC[name](model, x, path)


def sampler_of(settings: SchedulerSettings, config: SamplingConfig) -> SamplerName:
    """The configuration's sampler, else that of the model's scheduler."""
    return config.sampler or cast(SamplerName, settings.sampler)


def spacing_of(settings: SchedulerSettings, config: SamplingConfig) -> Spacing | Sequence[float]:
    """The configuration's table or spacing, else the model's spacing, else the sampler's default in diffusers."""
    if config.timesteps is not None:
        return config.timesteps
    is_discrete = sampler_of(settings, config) in _DISCRETE_GRID
    default: Spacing = "leading" if is_discrete else "linspace"
    if config.timestep_spacing is None and settings.sigmas is not None and not is_discrete:
        return settings.sigmas
    return config.timestep_spacing or settings.timestep_spacing or default


def plan(schedule: NoiseSchedule, settings: SchedulerSettings, config: SamplingConfig) -> Trajectory:
    """The levels that will be visited; arguments and errors as in `denoise`."""
    try:
        return _plan(schedule, settings, config)
    except ValueError as error:
        spacing = spacing_of(settings, config)
        if not isinstance(spacing, str):
            raise UsageError("cannot use these timesteps", str(error), "leave out what is above") from error
        raise UsageError(
            f"{sampler_of(settings, config)} cannot take {config.steps} steps with {spacing} spacing",
            f"the model has {schedule.num_timesteps} noise levels",
            "ask for fewer steps",
        ) from error


def _plan(schedule: NoiseSchedule, settings: SchedulerSettings, config: SamplingConfig) -> Trajectory:
    name, steps, offset = sampler_of(settings, config), config.steps, settings.steps_offset
    spacing = spacing_of(settings, config)
    if name == "lcm" and config.timesteps is None and config.timestep_spacing is None:
        return lcm_trajectory(schedule, steps)
    if name in ("ddpm", "lcm"):
        return ddpm_trajectory(schedule, steps, spacing, offset)
    if name in ("ddim", "pndm"):
        # What a file does not say is what the scheduler of that name takes it to be.
        last_is_clean = settings.set_alpha_to_one is not False if name == "ddim" else settings.set_alpha_to_one is True
        path = ddim_trajectory(schedule, steps, spacing, offset, last_is_clean)
        return path if name == "ddim" else path.finite()
    if name in _DPMPP_GRID:
        return dpmpp_trajectory(schedule, steps, spacing, offset)
    straight = name.startswith("flow_") or schedule.flow_shift is not None
    path = replace(euler_trajectory(schedule, steps, spacing, offset), straight=straight)
    # Stages between two levels are placed by σ, which must be finite.
    return path.finite() if name in ("dpmpp_2s_ancestral", "dpmpp_sde") else path
