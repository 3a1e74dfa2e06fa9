"""Whole trajectories, number by number, against the diffusers scheduler of the same name."""

import math

import pytest
import torch

from ldm_cli.core.diffusion import exponential_samplers, samplers, timesteps
from ldm_cli.core.diffusion.config import DiffusionConfig
from ldm_cli.core.diffusion.process import process_of

from .training_fields import TRAINING_FIELDS

diffusers = pytest.importorskip("diffusers")

SHAPE = (2, 4, 6, 6)
TYPES = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "linspace", "trailing")
STEPS = (1, 7, 50)
CLASSES = {
    "ddpm": diffusers.DDPMScheduler,
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
}


class ToyNetwork:
    """A fixed nonlinear network that keeps what it was given."""

    def __init__(self, prediction_type):
        self.prediction_type = prediction_type
        self.inputs, self.times = [], []

    def __call__(self, x, t):
        self.inputs.append(x.clone())
        self.times.append(float(t))
        a, b = math.cos(1.5 * float(t) / 1000), math.sin(1.5 * (float(t) + 20) / 1020)
        x0 = torch.tanh(1.5 * x + 0.3 * x.roll(1, -1) + math.sin(float(t) / 100))
        if self.prediction_type == "epsilon":
            return (x - a * x0) / b
        return x0 if self.prediction_type == "sample" else (a * x - x0) / b


def step_noise(i):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1000 + i))


def ours(name, network, noise, process, steps, spacing, offset, eta, alpha_to_one):
    denoise = samplers.clean_predictor(network, process.prediction)
    if name == "ddpm":
        path = timesteps.ddpm_timesteps(process, steps, spacing, offset)
        return samplers.euler(denoise, noise, path, step_noise, 1.0)
    if name == "ddim":
        path = timesteps.ddim_timesteps(process, steps, spacing, offset, alpha_to_one)
        return samplers.euler(denoise, noise, path, step_noise, eta)
    if name == "euler":
        path = timesteps.euler_timesteps(process, steps, spacing, offset)
        return samplers.euler(denoise, path.start_scale * noise, path, step_noise)
    path = timesteps.dpmpp_timesteps(process, steps, spacing, offset)
    return exponential_samplers.dpmpp_2m(denoise, noise, path, step_noise)


def theirs(monkeypatch, name, network, noise, config, steps, spacing, offset, eta, alpha_to_one):
    fields = {k: v for k, v in config.to_mapping().items() if k not in TRAINING_FIELDS}
    if name in ("ddpm", "ddim"):
        fields["clip_sample"] = False
    if name == "ddim":
        fields["set_alpha_to_one"] = alpha_to_one
    scheduler = CLASSES[name](**fields, timestep_spacing=spacing, steps_offset=offset)
    scheduler.set_timesteps(steps)
    x = noise * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        output = network(scheduler.scale_model_input(x, t), t)
        if name == "ddpm":
            monkeypatch.setattr(
                "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *args, step=i, **kwargs: step_noise(step)
            )
        extra = {"eta": eta, "variance_noise": step_noise(i) if eta else None} if name == "ddim" else {}
        x = scheduler.step(output, t, x, **extra).prev_sample
    return x


def compare(monkeypatch, name, config, steps, spacing, offset=1, eta=0.0, alpha_to_one=False, atol=1e-5):
    process = process_of(config)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    mine, other = ToyNetwork(config.prediction_type), ToyNetwork(config.prediction_type)
    result = ours(name, mine, noise, process, steps, spacing, offset, eta, alpha_to_one)
    expected = theirs(monkeypatch, name, other, noise, config, steps, spacing, offset, eta, alpha_to_one)
    assert len(mine.times) == steps
    torch.testing.assert_close(torch.tensor(mine.times), torch.tensor(other.times), rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.stack(mine.inputs), torch.stack(other.inputs), rtol=0, atol=atol)
    torch.testing.assert_close(result, expected, rtol=0, atol=atol)
    assert 0.02 < result.abs().max() < 10, "a degenerate comparison proves nothing"


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("name", CLASSES)
def test_trajectory_equals_that_of_diffusers(monkeypatch, name, prediction_type, spacing, steps):
    compare(monkeypatch, name, DiffusionConfig(prediction_type=prediction_type), steps, spacing)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("name", CLASSES)
def test_zero_snr_trajectory_equals_that_of_diffusers(monkeypatch, name, prediction_type, steps):
    config = DiffusionConfig(prediction_type=prediction_type, rescale_betas_zero_snr=True)
    # diffusers' Euler starts at y = 4096 · noise in float32, where y + dy/dσ · Δσ cancels all but three
    # digits; ours is written without that difference (see the next test).
    compare(monkeypatch, name, config, steps, "trailing", atol=1e-3 if name == "euler" else 1e-5)


@pytest.mark.parametrize("steps", STEPS)
def test_euler_from_zero_snr_loses_no_digits(steps):
    process = process_of(DiffusionConfig(prediction_type="v_prediction", rescale_betas_zero_snr=True))
    path = timesteps.euler_timesteps(process, steps, "trailing", 0)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    denoise = samplers.clean_predictor(ToyNetwork("v_prediction"), process.prediction)
    single = samplers.euler(denoise, path.start_scale * noise, path, step_noise)
    double = samplers.euler(denoise, path.start_scale * noise.double(), path, step_noise)
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-5)


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_with_noise_equals_that_of_diffusers(monkeypatch, spacing, eta):
    compare(monkeypatch, "ddim", DiffusionConfig(), 10, spacing, eta=eta, alpha_to_one=True)


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("name", CLASSES)
def test_other_schedules_and_offsets_equal_those_of_diffusers(monkeypatch, name, beta_schedule):
    config = DiffusionConfig(beta_schedule=beta_schedule, prediction_type="v_prediction", num_train_timesteps=400)
    compare(monkeypatch, name, config, 12, "leading", offset=0)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_signal_shares_equal_those_of_diffusers(beta_schedule, zero_snr):
    expected = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule=beta_schedule, rescale_betas_zero_snr=zero_snr
    )
    config = DiffusionConfig(
        beta_schedule=beta_schedule, rescale_betas_zero_snr=zero_snr, prediction_type="v_prediction"
    )
    actual = process_of(config).alphas_cumprod.float()
    torch.testing.assert_close(actual, expected.alphas_cumprod, rtol=0, atol=1e-6)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_levels_equal_those_of_diffusers_for_nearly_every_number_of_steps(spacing):
    process = process_of(DiffusionConfig())
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=0)
    for steps in (*range(1, 101), *range(101, 1000, 7), 1000):
        scheduler.set_timesteps(steps)
        expected = scheduler.timesteps.tolist()[:steps]  # for 62 counts numpy's arange is one too long, and ends at -1
        assert [*timesteps.ddpm_timesteps(process, steps, spacing, 0).times] == expected
