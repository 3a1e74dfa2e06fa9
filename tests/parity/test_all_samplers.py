"""Each sampler by its recipe name, number by number, against diffusers' scheduler of that method."""

import math

import pytest
import torch

from ldm_cli.core.diffusion import exponential_samplers, samplers
from ldm_cli.core.diffusion.config import DiffusionConfig
from ldm_cli.core.diffusion.process import process_of
from ldm_cli.core.diffusion.spacing import SigmaSpacing
from ldm_cli.core.diffusion.timesteps import Timesteps, euler_timesteps
from ldm_cli.formats.scheduler_file import SchedulerSettings
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.denoising import denoise, visited_timesteps

from .training_fields import TRAINING_FIELDS

diffusers = pytest.importorskip("diffusers")

SHAPE = (2, 4, 6, 6)
SPACINGS = ("leading", "linspace", "trailing")
SIGMA_GRIDS = {"karras": {"use_karras_sigmas": True}, "exponential": {"use_exponential_sigmas": True}}
SDE = {"algorithm_type": "sde-dpmsolver++"}
SCHEDULERS = {
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "dpm2": (diffusers.KDPM2DiscreteScheduler, {}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_sde": (diffusers.DPMSolverMultistepScheduler, SDE),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
    "lcm": (diffusers.LCMScheduler, {"clip_sample": False}),
    "flow_euler": (diffusers.FlowMatchEulerDiscreteScheduler, None),
    "flow_heun": (diffusers.FlowMatchHeunDiscreteScheduler, None),
}
TOLERANCE = 1e-5
# In a step from σ = 14.6 to 1 the mean of two slopes multiplies float32's rounding to 2e-5: these run in float64.
# In two steps diffusers' σ, float32 all the same, are too coarse for 1e-5: that is not compared.
IN_DOUBLE = ("heun", "dpm2")


class ToyNetwork:
    """A fixed smooth network that keeps when it was asked."""

    def __init__(self, prediction_type):
        self.prediction_type = prediction_type
        self.times = []

    def __call__(self, x, t):
        t = float(t)
        self.times.append(t)
        x0 = torch.tanh(0.7 * x + 0.3 * x.roll(1, -1) + math.sin(t / 300))
        if self.prediction_type == "flow_prediction":
            return 0.3 * x - x0
        a, b = math.cos(1.5 * t / 1000), math.sin(1.5 * (t + 20) / 1020)
        if self.prediction_type == "epsilon":
            return (x - a * x0) / b
        return x0 if self.prediction_type == "sample" else (a * x - x0) / b


def step_noise(i):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1000 + i))


def initial_noise(name=""):
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    return noise.double() if name in IN_DOUBLE else noise


def theirs(monkeypatch, name, network, diffusion, steps, spacing, times=None):
    scheduler_class, extra = SCHEDULERS[name]
    if extra is None:
        scheduler = scheduler_class(shift=diffusion.flow_shift)
    else:
        fields = {k: v for k, v in diffusion.to_mapping().items() if k not in TRAINING_FIELDS}
        if name in ("pndm", "lcm", "heun", "dpm2"):
            del fields["rescale_betas_zero_snr"]
        grid = SIGMA_GRIDS.get(spacing, {"timestep_spacing": spacing})
        scheduler = scheduler_class(**fields, **extra, **grid, **({} if name == "lcm" else {"steps_offset": 1}))
    scheduler.set_timesteps(steps)
    draws = iter(range(10**6))
    module = scheduler_class.__module__
    if name in ("euler_ancestral", "lcm", "dpmpp_2m_sde"):
        monkeypatch.setattr(f"{module}.randn_tensor", lambda *args, **kwargs: step_noise(next(draws)))
    x = initial_noise(name) * getattr(scheduler, "init_noise_sigma", 1.0)
    for i, t in enumerate(scheduler.timesteps):
        shown = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(shown, t if times is None else times[i]), t, x).prev_sample
    return x


def compare(monkeypatch, name, steps, spacing="leading", same_times=True, **diffusion):
    diffusion = DiffusionConfig(**diffusion)
    mine, other = ToyNetwork(diffusion.prediction_type), ToyNetwork(diffusion.prediction_type)
    config = SamplingConfig(sampler=name, steps=steps, timestep_spacing=None if name == "lcm" else spacing)
    process = process_of(diffusion)
    model = samplers.clean_predictor(mine, process.prediction)
    result = denoise(model, initial_noise(name), process, SchedulerSettings({}), config, step_noise)
    expected = theirs(monkeypatch, name, other, diffusion, steps, spacing, None if same_times else mine.times)
    assert 0.02 < result.abs().max() < 10, "a degenerate comparison proves nothing"
    torch.testing.assert_close(torch.tensor(mine.times), torch.tensor(other.times), rtol=0, atol=2e-3)
    torch.testing.assert_close(result, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("steps", [1, 3, 30])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["euler_ancestral", "heun", "dpm2", "dpmpp_2m_sde", "unipc"])
def test_trajectory_equals_that_of_diffusers(monkeypatch, name, prediction_type, spacing, steps):
    compare(monkeypatch, name, steps, spacing, prediction_type=prediction_type)


@pytest.mark.parametrize("steps", [3, 25])
@pytest.mark.parametrize("spacing", SIGMA_GRIDS)
@pytest.mark.parametrize("name", ["euler", "heun", "dpm2", "dpmpp_2m", "dpmpp_2m_sde", "unipc"])
def test_karras_and_exponential_trajectories_equal_those_of_diffusers(monkeypatch, name, spacing, steps):
    # Where diffusers cuts 998.99999 to 998, or rounds at the ends of a step but not within, networks are given our t.
    odd = (spacing == "exponential" and name in ("dpmpp_2m", "dpmpp_2m_sde", "unipc")) or (name, spacing) == (
        "dpm2",
        "karras",
    )
    compare(monkeypatch, name, steps, spacing, same_times=not odd)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 50])
def test_plms_equals_that_of_diffusers(monkeypatch, steps):
    compare(monkeypatch, "pndm", steps)


@pytest.mark.parametrize("steps", [1, 4, 8])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_lcm_equals_that_of_diffusers(monkeypatch, prediction_type, steps):
    compare(monkeypatch, "lcm", steps, prediction_type=prediction_type, beta_schedule="scaled_linear")


@pytest.mark.parametrize("steps", [1, 2, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", ["flow_euler", "flow_heun"])
def test_flow_trajectory_equals_that_of_diffusers(monkeypatch, name, shift, steps):
    compare(monkeypatch, name, steps, "linspace", prediction_type="flow_prediction", flow_shift=shift)


@pytest.mark.parametrize("steps", [1, 2, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc"])
def test_a_stiff_solver_on_a_flow_equals_that_of_diffusers(name, shift, steps):
    scheduler_class, extra = SCHEDULERS[name]
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
    scheduler = scheduler_class(**extra, **flow)
    scheduler.set_timesteps(steps)
    diffusion = DiffusionConfig(prediction_type="flow_prediction", flow_shift=shift)
    process, mine, other = process_of(diffusion), ToyNetwork("flow_prediction"), ToyNetwork("flow_prediction")
    model = samplers.clean_predictor(mine, process.prediction)
    if name == "dpmpp_2m":
        result = denoise(
            model,
            initial_noise(),
            process,
            SchedulerSettings({}),
            SamplingConfig(sampler=name, steps=steps),
            step_noise,
        )
    else:  # on their levels, which are not those of DPM-Solver++
        path = Timesteps.through([process.at_time(1000 * float(s)) for s in scheduler.sigmas[:-1]], process)
        result = exponential_samplers.unipc(model, initial_noise(), path)
    expected = initial_noise()
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        # diffusers rounds the times that it shows to the network to whole numbers.
        assert abs(t - 1000 * sigma) <= 1.0
        expected = scheduler.step(other(expected, 1000 * sigma), t, expected).prev_sample
    torch.testing.assert_close(torch.tensor(mine.times), torch.tensor(other.times), rtol=0, atol=2e-3)
    torch.testing.assert_close(result, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("pairs", [1, 4])
def test_two_stage_solver_equals_that_of_diffusers_where_its_stages_lie_midway(pairs):
    diffusion = DiffusionConfig()
    scheduler = diffusers.DPMSolverSinglestepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", use_exponential_sigmas=True
    )
    mine, other = ToyNetwork("epsilon"), ToyNetwork("epsilon")
    process = process_of(diffusion)
    path = euler_timesteps(process, pairs + 1, SigmaSpacing("exponential"), 0)
    x = exponential_samplers.dpmpp_2s(
        samplers.clean_predictor(mine, process.prediction), initial_noise(), path, step_noise, 0.0
    )

    scheduler.set_timesteps(2 * pairs + 1)
    expected = initial_noise()
    for t, time in zip(scheduler.timesteps, mine.times, strict=True):
        assert abs(t - time) <= 1.0, "diffusers cuts these timesteps to whole numbers"
        expected = scheduler.step(other(expected, time), t, expected).prev_sample
    torch.testing.assert_close(x, expected, rtol=0, atol=TOLERANCE)


def test_align_your_steps_table_gives_the_levels_that_diffusers_gives_for_it():
    table = (999, 850, 736, 645, 545, 455, 343, 233, 124, 24)
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading"
    )
    scheduler.set_timesteps(timesteps=list(table))
    config = SamplingConfig(sampler="euler", steps=10, timesteps=table)
    path = visited_timesteps(process_of(DiffusionConfig()), SchedulerSettings({}), config)
    sigmas = torch.tensor([start.sigma for start, _ in path.steps])
    assert path.times == table
    torch.testing.assert_close(sigmas, scheduler.sigmas[:-1], rtol=1e-6, atol=0)
