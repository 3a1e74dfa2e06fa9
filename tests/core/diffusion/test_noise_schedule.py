import math

import pytest
import torch

from ldm_cli.core.diffusion.config import DiffusionConfig
from ldm_cli.core.diffusion.schedule import NoiseSchedule

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def schedule(**fields):
    return NoiseSchedule.from_config(DiffusionConfig(**fields))


@pytest.mark.parametrize("name", SCHEDULES)
def test_signal_falls_with_every_level_and_stays_a_share_of_one(name):
    alphas = schedule(beta_schedule=name).alphas_cumprod
    assert alphas.dtype == torch.float64
    assert alphas.shape == (1000,)
    assert bool((alphas.diff() < 0).all())
    assert 0 < alphas[-1] < alphas[0] < 1


def test_first_and_last_beta_are_those_of_the_config():
    for name in ("linear", "scaled_linear"):
        alphas = schedule(beta_schedule=name, beta_start=0.001, beta_end=0.02).alphas_cumprod
        assert 1 - alphas[0].item() == pytest.approx(0.001, rel=1e-4)
        assert 1 - (alphas[-1] / alphas[-2]).item() == pytest.approx(0.02, rel=1e-4)


def test_cosine_schedule_is_the_squared_cosine_where_beta_is_not_capped():
    alphas = schedule(beta_schedule="squaredcos_cap_v2").alphas_cumprod

    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    assert alphas[499].item() == pytest.approx(f(500) / f(0), rel=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_zero_snr_schedule_ends_in_pure_noise_and_starts_as_before(name):
    plain = schedule(beta_schedule=name, prediction_type="v_prediction")
    zero = schedule(beta_schedule=name, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert zero.alphas_cumprod[-1] == 0
    assert zero.snr(torch.tensor([999])) == 0
    assert zero.alphas_cumprod[0].item() == pytest.approx(plain.alphas_cumprod[0].item(), rel=1e-6)  # in float32


def test_adding_noise_and_velocity_rotate_signal_and_noise():
    process = schedule(prediction_type="v_prediction")
    x0, noise = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([0, 500, 999])
    x_t, v = process.add_noise(x0, noise, t), process.velocity(x0, noise, t)
    signal, sigma = process.signal_and_noise(t, x0)
    assert x_t.shape == v.shape == x0.shape
    torch.testing.assert_close(signal * x_t - sigma * v, x0)
    torch.testing.assert_close(sigma * x_t + signal * v, noise)
    torch.testing.assert_close(process.snr(t), ((signal / sigma) ** 2).flatten())


def test_noised_unit_data_keeps_unit_variance():
    process = schedule()
    x0, noise = torch.randn(2, 1, 200_000, generator=torch.Generator().manual_seed(0))
    for t in (10, 300, 900):
        assert process.add_noise(x0, noise, torch.tensor([t])).var().item() == pytest.approx(1, abs=0.02)


def test_timesteps_of_another_batch_size_are_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"\(2,\).*\(3, 4\)"):
        schedule().add_noise(torch.zeros(3, 4), torch.zeros(3, 4), torch.tensor([1, 2]))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_levels_lie_on_the_straight_line_from_data_to_noise(shift):
    flow = schedule(prediction_type="flow_prediction", flow_shift=shift)
    torch.testing.assert_close(flow.signals + flow.noises, torch.ones(1000, dtype=torch.float64))
    assert (flow.signals[-1], flow.noises[-1]) == (0, 1)
    assert flow.noises[499].item() == pytest.approx(shift * 0.5 / (1 + (shift - 1) * 0.5))
    assert flow.told(torch.tensor([499])).item() == pytest.approx(1000 * flow.noises[499].item())
    x0, noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([0, 400, 999])
    b = flow.noises[t][:, None]
    torch.testing.assert_close(flow.add_noise(x0, noise, t) - b * flow.target(x0, noise, t), x0)


def test_the_network_is_told_t_itself_where_variance_is_preserved():
    assert schedule().told(torch.tensor([0, 7, 999])).tolist() == [0.0, 7.0, 999.0]


def test_settings_that_contradict_a_flow_are_refused():
    with pytest.raises(ValueError, match=r"flow_shift=3.0 needs prediction_type flow_prediction"):
        DiffusionConfig(flow_shift=3.0)
    with pytest.raises(ValueError, match="no betas"):
        DiffusionConfig(prediction_type="flow_prediction", rescale_betas_zero_snr=True)
