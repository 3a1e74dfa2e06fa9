"""From initial noise to latents: the sampler and the levels that a configuration names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

from torch import Tensor

from ldm_cli.core.diffusion.exponential_samplers import dpmpp_2m, dpmpp_2s, dpmpp_3m, dpmpp_sde, unipc
from ldm_cli.core.diffusion.process import Process
from ldm_cli.core.diffusion.samplers import CleanPredictor, NoiseSource, dpm2, euler, heun, lcm, lms, pndm
from ldm_cli.core.diffusion.spacing import SigmaSpacing, Spacing
from ldm_cli.core.diffusion.timesteps import (
    Timesteps,
    ddim_timesteps,
    ddpm_timesteps,
    dpmpp_timesteps,
    euler_timesteps,
    lcm_timesteps,
)
from ldm_cli.errors import UsageError
from ldm_cli.formats.scheduler_file import SchedulerSettings
from ldm_cli.sampling.config import SamplerName, SamplingConfig

_Grid = Literal["ddpm", "ddim", "pndm", "euler", "straight", "finite", "dpmpp"]
_Arguments = tuple[Process, int, Spacing | Sequence[float], int]
_GRIDS: dict[_Grid, Callable[[_Arguments, bool | None], Timesteps]] = {
    "ddpm": lambda asked, to_one: ddpm_timesteps(*asked),
    # Where a file does not say it, DDIM ends at ᾱ = 1 and PNDM at the first level: so do the schedulers of diffusers.
    "ddim": lambda asked, to_one: ddim_timesteps(*asked, to_one is not False),
    "pndm": lambda asked, to_one: ddim_timesteps(*asked, to_one is True).finite(),
    "euler": lambda asked, to_one: euler_timesteps(*asked),
    "straight": lambda asked, to_one: replace(euler_timesteps(*asked), straight=True),
    # Stages between two levels are placed by σ, which must be finite.
    "finite": lambda asked, to_one: euler_timesteps(*asked).finite(),
    "dpmpp": lambda asked, to_one: dpmpp_timesteps(*asked),
}
"""By process, steps, spacing and offset, and `set_alpha_to_one` of the model's scheduler file."""


@dataclass(frozen=True)
class _Sampler:
    """How a sampler is run.

    Attributes:
        grid: which levels it visits.
        eta: share of the reverse process's noise that it adds.
        takes_eta: whether the configuration may choose another η.
    """

    run: Callable[[CleanPredictor, Tensor, Timesteps, NoiseSource, float], Tensor]
    grid: _Grid
    eta: float = 0.0
    takes_eta: bool = False

    @property
    def steps_in_sigma(self) -> bool:
        """Whether its levels may lie between those of training."""
        return self.grid not in ("ddpm", "ddim", "pndm")


def _without_noise(
    method: Callable[[CleanPredictor, Tensor, Timesteps], Tensor],
) -> Callable[[CleanPredictor, Tensor, Timesteps, NoiseSource, float], Tensor]:
    return lambda denoise, x, timesteps, step_noise, eta: method(denoise, x, timesteps)


_SAMPLERS: dict[SamplerName, _Sampler] = {
    "ddpm": _Sampler(euler, "ddpm", eta=1.0),
    "ddim": _Sampler(euler, "ddim", takes_eta=True),
    "euler": _Sampler(euler, "euler"),
    "euler_ancestral": _Sampler(euler, "euler", eta=1.0, takes_eta=True),
    "heun": _Sampler(_without_noise(heun), "euler"),
    "dpm2": _Sampler(_without_noise(dpm2), "euler"),
    "lms": _Sampler(_without_noise(lms), "euler"),
    "dpmpp_2m": _Sampler(dpmpp_2m, "dpmpp"),
    "dpmpp_2m_sde": _Sampler(dpmpp_2m, "dpmpp", eta=1.0, takes_eta=True),
    "dpmpp_2s_ancestral": _Sampler(dpmpp_2s, "finite", eta=1.0, takes_eta=True),
    "dpmpp_sde": _Sampler(dpmpp_sde, "finite", eta=1.0, takes_eta=True),
    "dpmpp_3m_sde": _Sampler(dpmpp_3m, "dpmpp", eta=1.0, takes_eta=True),
    "unipc": _Sampler(_without_noise(unipc), "dpmpp"),
    "pndm": _Sampler(_without_noise(pndm), "pndm"),
    "flow_euler": _Sampler(euler, "euler"),
    "flow_heun": _Sampler(_without_noise(heun), "straight"),
    "lcm": _Sampler(lambda denoise, x, timesteps, step_noise, eta: lcm(denoise, x, timesteps, step_noise), "ddpm"),
}


@dataclass(frozen=True)
class Start:
    """Where sampling begins when it does not begin at pure noise (Meng et al. 2022, SDEdit, arXiv:2108.01073).

    Attributes:
        latents: the picture to change, [B, …] like the noise.
        num_steps: the last steps, which are taken. All of them begin at pure noise, and so forget `latents`; none
            returns them.
    """

    latents: Tensor
    num_steps: int


def denoise(
    model: CleanPredictor,
    noise: Tensor,
    process: Process,
    settings: SchedulerSettings,
    config: SamplingConfig,
    step_noise: NoiseSource,
    start: Start | None = None,
) -> Tensor:
    """Sample x_0 from standard normal noise [B, …]; of its shape and type.

    Args:
        noise: initial noise, standard normal.
        process: the noise levels that the network was trained at.
        settings: of the model's scheduler file.
        config: sampler, steps, η, and a spacing other than the model's.
        start: latents to begin with, noised to the level of the first step that is taken; None: pure noise.

    Raises:
        UsageError: more steps than the network has levels.
    """
    timesteps = visited_timesteps(process, settings, config)
    x = timesteps.start_scale * noise
    if start is not None and start.num_steps == 0:
        return start.latents
    if start is not None and start.num_steps < config.steps:
        timesteps = timesteps.last(start.num_steps)
        first = timesteps.steps[0][0]
        x = first.signal * start.latents + first.noise * noise
    sampler = _SAMPLERS[sampler_of(settings, config)]
    eta = config.eta if sampler.takes_eta and config.eta is not None else sampler.eta
    return sampler.run(model, x, timesteps, step_noise, eta)


def sampler_of(settings: SchedulerSettings, config: SamplingConfig) -> SamplerName:
    """The configuration's sampler, else that of the model's scheduler."""
    return config.sampler or cast(SamplerName, settings.sampler)


def takes_eta(settings: SchedulerSettings, config: SamplingConfig) -> bool:
    """Whether the sampler has a use for η."""
    return _SAMPLERS[sampler_of(settings, config)].takes_eta


def spacing_of(settings: SchedulerSettings, config: SamplingConfig) -> Spacing | Sequence[float]:
    """The configuration's table or spacing, else the model's spacing, else the sampler's default in diffusers."""
    if config.timesteps is not None:
        return config.timesteps
    if config.timestep_spacing == "karras" or config.timestep_spacing == "exponential":
        return SigmaSpacing(config.timestep_spacing)
    if config.timestep_spacing is not None:
        return config.timestep_spacing
    if _SAMPLERS[sampler_of(settings, config)].steps_in_sigma:
        linear = settings.timestep_spacing or "linspace"
        if settings.sigmas is None:
            return linear
        return SigmaSpacing(settings.sigmas, linear, settings.sigma_min, settings.sigma_max)
    return settings.timestep_spacing or "leading"


def visited_timesteps(process: Process, settings: SchedulerSettings, config: SamplingConfig) -> Timesteps:
    """The levels that will be visited; arguments and errors as in `denoise`."""
    name, spacing = sampler_of(settings, config), spacing_of(settings, config)
    is_distilled = name == "lcm" and config.timesteps is None and config.timestep_spacing is None
    try:
        if is_distilled:
            return lcm_timesteps(process, config.steps, settings.num_distilled)
        asked = process, config.steps, spacing, settings.steps_offset
        return _GRIDS[_SAMPLERS[name].grid](asked, settings.set_alpha_to_one)
    except ValueError as error:
        if is_distilled:
            cause = f"latent consistency models are distilled at {settings.num_distilled} levels (4 to 8 steps suffice)"
            raise UsageError(f"lcm cannot take {config.steps} steps", cause, "ask for fewer steps") from error
        if config.timesteps is not None:
            raise UsageError("cannot use these timesteps", str(error), "remove higher timesteps") from error
        raise UsageError(
            f"{name} cannot take {config.steps} steps with {getattr(spacing, 'between', spacing)} spacing",
            f"the model has {process.num_timesteps} noise levels",
            "ask for fewer steps",
        ) from error
