import math
from dataclasses import replace

import pytest
import torch

from ldm_cli.core.diffusion.config import DiffusionConfig
from ldm_cli.core.diffusion.loss import add_noise
from ldm_cli.core.diffusion.process import Flow, VariancePreserving, process_of
from ldm_cli.core.diffusion.samplers import clean_predictor, euler, heun
from ldm_cli.core.diffusion.timesteps import euler_timesteps

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def process(**fields):
    return process_of(DiffusionConfig(**fields))


def shares(steps=1000):
    """u at the middles of T equal ranges, float32."""
    return (torch.arange(steps) + 0.5) / steps


@pytest.mark.parametrize("name", SCHEDULES)
def test_signal_falls_with_every_level_and_stays_a_share_of_one(name):
    alphas = process(beta_schedule=name).alphas_cumprod
    assert alphas.dtype == torch.float64
    assert alphas.shape == (1000,)
    assert bool((alphas.diff() < 0).all())
    assert 0 < alphas[-1] < alphas[0] < 1


def test_first_and_last_beta_are_those_of_the_config():
    for name in ("linear", "scaled_linear"):
        alphas = process(beta_schedule=name, beta_start=0.001, beta_end=0.02).alphas_cumprod
        assert 1 - alphas[0].item() == pytest.approx(0.001, rel=1e-4)
        assert 1 - (alphas[-1] / alphas[-2]).item() == pytest.approx(0.02, rel=1e-4)


def test_cosine_schedule_is_the_squared_cosine_where_beta_is_not_capped():
    alphas = process(beta_schedule="squaredcos_cap_v2").alphas_cumprod

    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    assert alphas[499].item() == pytest.approx(f(500) / f(0), rel=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_zero_snr_schedule_ends_in_pure_noise_and_starts_as_before(name):
    plain = process(beta_schedule=name, prediction_type="v_prediction")
    zero = process(beta_schedule=name, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert zero.alphas_cumprod[-1] == 0
    assert [values.item() for values in zero.at(torch.tensor(0.9999))] == [0.0, 1.0, 999.0]
    assert zero.alphas_cumprod[0].item() == pytest.approx(plain.alphas_cumprod[0].item(), rel=1e-6)  # in float32


@pytest.mark.parametrize("steps", [77, 1000])
def test_the_middles_of_equal_ranges_give_every_level_of_a_variance_preserving_process(steps):
    diffusion = process(num_train_timesteps=steps)
    assert isinstance(diffusion, VariancePreserving)
    a, b, time = diffusion.at(shares(steps))
    assert time.dtype == torch.float32
    assert time.tolist() == list(range(steps))
    torch.testing.assert_close(a**2, diffusion.alphas_cumprod, rtol=0, atol=1e-15)
    torch.testing.assert_close(a**2 + b**2, torch.ones(steps, dtype=torch.float64), rtol=0, atol=1e-15)


def test_levels_are_cut_at_equal_shares_and_a_share_of_one_is_the_last():
    # 1 is what the largest number of float32 below 1, half a step up, is rounded to.
    u = torch.tensor([0.0, 0.00099, 0.00101, 0.5, 1.0 - 2.0**-24, 1.0])
    assert process().at(u)[2].tolist() == [0, 0, 1, 500, 999, 999]


def test_levels_keep_the_shape_of_the_shares():
    for kind in ("epsilon", "flow_prediction"):
        assert [values.shape for values in process(prediction_type=kind).at(torch.rand(2, 3))] == [(2, 3)] * 3


def test_the_table_of_levels_is_copied_to_a_device_once():
    diffusion, u = process(), torch.zeros(2, device="meta")
    diffusion.at(u)
    tables = dict(diffusion._tables)
    diffusion.at(u)
    assert [device.type for device in tables] == ["meta"]
    assert diffusion._tables[u.device] is tables[u.device]


def test_noised_unit_data_keeps_unit_variance():
    x0, noise = torch.randn(2, 1, 200_000, generator=torch.Generator().manual_seed(0))
    for u in (0.01, 0.3, 0.9):
        a, b, _ = process().at(torch.tensor([u]))
        assert add_noise(x0, noise, a, b).var().item() == pytest.approx(1, abs=0.02)


def test_an_unshifted_flow_is_one_minus_u_and_u():
    u = torch.rand(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b, time = process(prediction_type="flow_prediction").at(u)
    assert torch.equal(a, 1 - u)
    assert torch.equal(b, u)
    assert torch.equal(time, (1000 * u).float())


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_levels_lie_on_the_straight_line_from_data_to_noise(shift):
    flow = process(prediction_type="flow_prediction", flow_shift=shift)
    assert isinstance(flow, Flow)
    shares = torch.linspace(0.0, 1.0, 1001, dtype=torch.float64)
    a, b, time = flow.at(shares)
    torch.testing.assert_close(a + b, torch.ones_like(shares))
    torch.testing.assert_close(b, shift * shares / (1 + (shift - 1) * shares))
    torch.testing.assert_close(time, 1000 * b.float())
    x0, noise = torch.randn(2, 1001, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    velocity = flow.prediction.target(x0, noise, a, b)
    torch.testing.assert_close(add_noise(x0, noise, a, b) - b[:, None] * velocity, x0)


@pytest.mark.parametrize("fields", [{}, {"prediction_type": "flow_prediction", "flow_shift": 3.0}], ids=["vp", "flow"])
def test_samplers_and_training_mean_the_same_level_by_a_time(fields):
    found = process(**fields)
    a, b, time = found.at(torch.tensor([0.1, 0.5, 0.9]))
    for i, t in enumerate(time.tolist()):
        level = found.at_time(t)
        assert (level.signal, level.noise) == pytest.approx((a[i].item(), b[i].item()), rel=1e-6)
        assert found.at_sigma(level.sigma).t == pytest.approx(t, rel=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("sampler", "order"), [(lambda d, x, p: euler(d, x, p, None), 1), (heun, 2)])
def test_the_velocity_of_a_gaussian_integrates_to_its_distribution(shift, sampler, order):
    """With data N(m, s²), each quantile of the noise moves to the same quantile of the data: m + s z."""
    mean, deviation, z = 1.5, 0.5, torch.linspace(-2, 2, 9, dtype=torch.float64)
    flow = process(prediction_type="flow_prediction", flow_shift=shift)

    def velocity(x, t):
        """E[ε − x_0 | x]."""
        a, b = 1 - t / 1000, t / 1000
        rest = (x - a * mean) / (a**2 * deviation**2 + b**2)
        return b * rest - (mean + a * deviation**2 * rest)

    errors = []
    for steps in (50, 200):
        path = euler_timesteps(flow, steps, "linspace", 0)
        # The last step from b = 1/1000 to 0 is Euler's, and as short as that: it does not count.
        path = replace(path, steps=path.steps[:-1])
        end = path.steps[-1][1]
        x = sampler(clean_predictor(velocity, flow.prediction), z, path)
        exact = end.signal * mean + math.hypot(end.signal * deviation, end.noise) * z
        errors.append((x - exact).abs().max().item())
    assert errors[0] / errors[1] > 0.9 * 4**order
    assert errors[1] < 0.02


def test_settings_that_contradict_a_flow_are_refused():
    with pytest.raises(ValueError, match=r"flow_shift=3.0 needs prediction_type flow_prediction"):
        DiffusionConfig(flow_shift=3.0)
    with pytest.raises(ValueError, match="no betas"):
        DiffusionConfig(prediction_type="flow_prediction", rescale_betas_zero_snr=True)
