"""From initial noise to latents: the sampler that a configuration names, on the levels that it names."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ldm_cli.core.diffusion import samplers
from ldm_cli.core.diffusion.samplers import Denoiser, NoiseSource
from ldm_cli.core.diffusion.schedule import NoiseSchedule
from ldm_cli.core.diffusion.trajectory import (
    Spacing,
    Trajectory,
    ddim_trajectory,
    ddpm_trajectory,
    dpmpp_trajectory,
    euler_trajectory,
)
from ldm_cli.errors import UsageError
from ldm_cli.formats.pipeline_folder import SchedulerSettings
from ldm_cli.sampling.config import SamplingConfig


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
        model: the network, guided.
        noise: initial noise, standard normal.
        schedule: the levels the network was trained at.
        settings: what the model's scheduler file says beside that.
        config: sampler, steps, η, and the spacing if it is not to be the model's.
        step_noise: fresh noise of every step.
        start: latents to begin with, noised to the level that their strength names; None: pure noise.

    Raises:
        UsageError: more steps than the network has levels.
    """
    path, kind = plan(schedule, settings, config), schedule.prediction_type
    if start is not None and start.strength < 1.0:
        path = _last_steps(path, int(start.strength * config.steps))
        if len(path) == 0:
            return start.latents
        signal, sigma = math.sqrt(path.alpha_bars[0]), math.sqrt(1.0 - path.alpha_bars[0])
        noise = signal * start.latents + sigma * noise
        if config.sampler == "euler":
            # Euler scales what it is given by 1/√ᾱ with `leading` spacing, else by σ = √(1/ᾱ − 1).
            noise = noise if spacing_of(settings, config) == "leading" else noise / sigma
    if config.sampler == "ddpm":
        return samplers.ddpm(model, noise, path, kind, step_noise)
    if config.sampler == "ddim":
        return samplers.ddim(model, noise, path, kind, config.eta or 0.0, step_noise)
    if config.sampler == "euler":
        return samplers.euler(model, noise, path, kind, spacing_of(settings, config))
    return samplers.dpmpp_2m(model, noise, path, kind)


def spacing_of(settings: SchedulerSettings, config: SamplingConfig) -> Spacing:
    """The time spacing: the configuration's, else the model's, else the diffusers default of the sampler."""
    default: Spacing = "leading" if config.sampler in ("ddpm", "ddim") else "linspace"
    return config.timestep_spacing or settings.timestep_spacing or default


def plan(schedule: NoiseSchedule, settings: SchedulerSettings, config: SamplingConfig) -> Trajectory:
    """The levels that will be visited; arguments and errors as in `denoise`."""
    spacing, offset = spacing_of(settings, config), settings.steps_offset
    try:
        if config.sampler == "ddpm":
            return ddpm_trajectory(schedule, config.steps, spacing, offset)
        if config.sampler == "ddim":
            last_is_clean = settings.set_alpha_to_one is not False
            return ddim_trajectory(schedule, config.steps, spacing, offset, last_is_clean)
        if config.sampler == "euler":
            return euler_trajectory(schedule, config.steps, spacing, offset)
        return dpmpp_trajectory(schedule, config.steps, spacing, offset)
    except ValueError as error:
        raise UsageError(
            f"{config.sampler} cannot take {config.steps} steps with {spacing} spacing",
            f"the model has {schedule.num_timesteps} noise levels",
            "ask for fewer steps",
        ) from error


def _last_steps(path: Trajectory, count: int) -> Trajectory:
    """The last `count` steps."""
    first = len(path) - count
    return Trajectory(path.timesteps[first:], path.alpha_bars[first:], path.next_alpha_bars[first:])
