"""Samplers on data whose exact denoiser is known: Gaussians, and a single point."""

import math

import pytest
import torch

from ldm_cli.core.diffusion import exponential_samplers, samplers, timesteps
from ldm_cli.core.diffusion.config import DiffusionConfig
from ldm_cli.core.diffusion.prediction import EPSILON
from ldm_cli.core.diffusion.process import process_of

MEAN, DEVIATION = 1.5, 0.5
NAMES = ("ddpm", "ddim", "ddim-eta", "euler", "dpmpp_2m")
PROCESS = process_of(DiffusionConfig(beta_schedule="squaredcos_cap_v2"))


def exact_epsilon(x, t, mean=MEAN, deviation=DEVIATION):
    """E[ε | x_t] for x_0 ~ N(mean, deviation²): the conditional mean of jointly Gaussian variables."""
    low = min(math.floor(t), PROCESS.num_timesteps - 2)
    sigmas = [math.sqrt(1 / float(PROCESS.alphas_cumprod[i]) - 1) for i in (low, low + 1)]
    sigma = sigmas[0] + (t - low) * (sigmas[1] - sigmas[0])
    a, b = 1 / math.sqrt(1 + sigma**2), sigma / math.sqrt(1 + sigma**2)
    return b * (x - a * mean) / (a**2 * deviation**2 + b**2)


def sample(name, model, noise, steps, spacing="leading", step_noise=None):
    if step_noise is None:
        generator = torch.Generator().manual_seed(5)

        def step_noise(i):
            return torch.randn(noise.shape, generator=generator, dtype=noise.dtype)

    denoise = samplers.clean_predictor(model, EPSILON)
    if name == "ddpm":
        path = timesteps.ddpm_timesteps(PROCESS, steps, spacing, 0)
        return samplers.euler(denoise, noise, path, step_noise, 1.0)
    if name.startswith("ddim"):
        path = timesteps.ddim_timesteps(PROCESS, steps, spacing, 0, True)
        return samplers.euler(denoise, noise, path, step_noise, 1.0 if name.endswith("eta") else 0.0)
    if name == "euler":
        path = timesteps.euler_timesteps(PROCESS, steps, spacing, 0)
        return samplers.euler(denoise, path.start_scale * noise, path, step_noise)
    path = timesteps.dpmpp_timesteps(PROCESS, steps, spacing, 0)
    return exponential_samplers.dpmpp_2m(denoise, noise, path, step_noise)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", NAMES)
def test_gaussian_data_is_drawn_with_its_mean_and_deviation(name, spacing):
    noise = torch.randn(40_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = sample(name, exact_epsilon, noise, 249, spacing)  # 1000 // (249 + 1) lets `leading` start near the top
    assert x.shape == noise.shape
    assert x.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert x.std().item() == pytest.approx(DEVIATION, abs=0.02)


def test_ode_solvers_approach_the_closed_form_solution_and_the_second_order_one_is_nearer():
    # With Gaussian data the ODE is solved by x_0 = mean + deviation · x_T, whatever the schedule.
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)
    exact = MEAN + DEVIATION * noise
    fine = {}
    for name in ("ddim", "euler", "dpmpp_2m"):
        errors = [(sample(name, exact_epsilon, noise, n, "trailing") - exact).abs().max() for n in (50, 200)]
        assert errors[1] < errors[0] / 3.5
        fine[name] = errors[1].item()
    assert fine["dpmpp_2m"] < fine["ddim"] / 1.5 < fine["euler"] / 1.5 < 0.01


def test_ancestral_sampling_without_its_noise_falls_to_the_centre():
    noise = torch.randn(10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = sample("ddpm", exact_epsilon, noise, 250, step_noise=lambda i: torch.zeros_like(noise))
    assert x.mean().item() == pytest.approx(MEAN, abs=0.05)
    assert x.std() < DEVIATION / 5


@pytest.mark.parametrize("steps", [1, 2, 30, 250, 1000])
@pytest.mark.parametrize("name", NAMES)
def test_a_single_point_is_found_exactly_in_any_number_of_steps(name, steps):
    if name == "dpmpp_2m" and steps == 1000:
        pytest.skip("needs one level more than it has steps")
    noise = torch.randn(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = sample(name, lambda x, t: exact_epsilon(x, t, deviation=0.0), noise, steps)
    torch.testing.assert_close(x, torch.full_like(x, MEAN), rtol=0, atol=1e-6)


def test_only_samplers_with_noise_ask_for_it_and_never_in_the_last_step():
    asked = []

    def step_noise(i):
        asked.append(i)
        return torch.zeros(3)

    for name, expected in [("ddpm", [0, 1, 2, 3]), ("ddim", []), ("ddim-eta", [0, 1, 2, 3])]:
        asked.clear()
        sample(name, exact_epsilon, torch.zeros(3), 5, step_noise=step_noise)
        assert asked == expected


def test_more_steps_than_levels_are_refused_with_both_numbers():
    for name, steps in [("ddpm", 1001), ("ddim", 1001), ("dpmpp_2m", 1000)]:
        with pytest.raises(ValueError, match=rf"num_steps={steps}.*1000 levels"):
            sample(name, exact_epsilon, torch.zeros(1), steps)


def test_leading_offset_never_leads_past_the_last_level():
    assert timesteps.ddpm_timesteps(PROCESS, 1000, "leading", 1).times == tuple(range(999, -1, -1))
    assert timesteps.ddpm_timesteps(PROCESS, 500, "leading", 1).times == tuple(range(999, 0, -2))
