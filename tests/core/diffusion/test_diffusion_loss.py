import pytest
import torch

from ldm_cli.core.diffusion.config import DiffusionConfig
from ldm_cli.core.diffusion.loss import diffusion_loss, min_snr_weight
from ldm_cli.core.diffusion.prediction import to_epsilon, to_x0
from ldm_cli.core.diffusion.schedule import NoiseSchedule

TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")


def draw(prediction_type):
    generator = torch.Generator().manual_seed(1)
    schedule = NoiseSchedule.from_config(DiffusionConfig(prediction_type=prediction_type))
    x0, noise = torch.randn(2, 4, 3, 6, 6, generator=generator, dtype=torch.float64)
    return schedule, x0, noise, torch.tensor([0, 250, 700, 999])


@pytest.mark.parametrize("prediction_type", TYPES)
def test_a_perfect_prediction_is_converted_back_to_signal_and_noise(prediction_type):
    schedule, x0, noise, t = draw(prediction_type)
    x_t = schedule.add_noise(x0, noise, t)
    signal, sigma = schedule.signal_and_noise(t, x0)
    target = schedule.target(x0, noise, t)
    torch.testing.assert_close(to_x0(target, x_t, signal, sigma, prediction_type), x0)
    torch.testing.assert_close(to_epsilon(target, x_t, signal, sigma, prediction_type), noise)
    assert diffusion_loss(schedule, target, x0, noise, t, 5.0).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("prediction_type", TYPES)
def test_min_snr_loss_is_the_same_function_of_the_x0_error_for_every_prediction_type(prediction_type):
    schedule, x0, noise, t = draw(prediction_type)
    gamma = 5.0
    target = schedule.target(x0, noise, t)
    output = target + 0.1 * torch.randn(target.shape, generator=torch.Generator().manual_seed(2), dtype=target.dtype)
    x_t = schedule.add_noise(x0, noise, t)
    x0_hat = to_x0(output, x_t, *schedule.signal_and_noise(t, x0), prediction_type)
    x0_error = (x0_hat - x0).square().flatten(1).mean(1)
    expected = schedule.snr(t).clamp(max=gamma) * x0_error
    loss = diffusion_loss(schedule, output, x0, noise, t, gamma)
    assert loss.shape == (4,)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_plain_loss_is_the_mean_squared_error_per_sample():
    schedule, x0, noise, t = draw("epsilon")
    loss = diffusion_loss(schedule, noise + torch.arange(4.0).view(4, 1, 1, 1), x0, noise, t)
    torch.testing.assert_close(loss, torch.tensor([0.0, 1.0, 4.0, 9.0]))


def test_min_snr_weights_are_finite_at_zero_snr():
    zero = torch.zeros(1, dtype=torch.float64)
    assert [min_snr_weight(zero, 5.0, kind).item() for kind in TYPES] == [1.0, 0.0, 0.0, 0.0]


def test_epsilon_at_zero_signal_and_unknown_predictions_are_refused():
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="undetermined"):
        to_x0(x, x, 0.0, 1.0, "epsilon")
    with pytest.raises(ValueError, match="x_2"):
        to_x0(x, x, 1.0, 1.0, "x_2")
    with pytest.raises(ValueError, match="x_2"):
        to_epsilon(x, x, 1.0, 1.0, "x_2")
    with pytest.raises(ValueError, match="x_2"):
        min_snr_weight(x, 5.0, "x_2")
