"""The prediction table: both inverses at random levels, and min-SNR weights against the published formulas."""

import pytest
import torch

from ldm_cli.core.diffusion.prediction import PREDICTIONS, SAMPLE

NAMES = list(PREDICTIONS)


def random_levels(kind):
    """a and b, float64 [50]: on the circle of variance preserving processes, or on the line of flows."""
    share = 0.02 + 0.96 * torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (share.sqrt(), (1 - share).sqrt()) if kind == "variance preserving" else (1 - share, share)


CASES = [
    *(("variance preserving", name) for name in ("epsilon", "v_prediction", "sample")),
    *(("flow", name) for name in ("epsilon", "sample", "flow_prediction")),
]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_perfect_prediction_gives_signal_and_noise_back(kind, name):
    a, b = (values[:, None] for values in random_levels(kind))
    x0, noise = torch.randn(2, 50, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = a * x0 + b * noise
    target = PREDICTIONS[name].target(x0, noise, a, b)
    torch.testing.assert_close(PREDICTIONS[name].x0(target, x, a, b), x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(PREDICTIONS[name].epsilon(target, x, a, b), noise, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_third_coefficient_is_the_determinant_of_the_first_two(kind, name):
    a, b = random_levels(kind)
    p, q, d = PREDICTIONS[name].coefficients(a, b)
    torch.testing.assert_close(a * q - b * p, d + torch.zeros_like(a), rtol=0, atol=1e-15)


def test_targets_are_the_noise_the_velocity_and_the_sample():
    x0, noise, a, b = torch.tensor([2.0]), torch.tensor([5.0]), 0.6, 0.8
    targets = {name: prediction.target(x0, noise, a, b).item() for name, prediction in PREDICTIONS.items()}
    expected = {"epsilon": 5.0, "v_prediction": 0.6 * 5 - 0.8 * 2, "sample": 2.0, "flow_prediction": 3.0}
    assert targets == pytest.approx(expected)


@pytest.mark.parametrize("gamma", [0.5, 5.0])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_min_snr_weights_are_the_published_ones(kind, name, gamma):
    """Hang et al. 2023, section 3.4; for the velocity the error in x_0 is b times that in u."""
    a, b = random_levels(kind)
    snr = (a / b) ** 2
    capped = snr.clamp(max=gamma)
    expected = {
        "epsilon": capped / snr,
        "v_prediction": capped / (snr + 1),
        "sample": capped,
        "flow_prediction": capped / (snr.sqrt() + 1) ** 2,
    }
    torch.testing.assert_close(PREDICTIONS[name].min_snr_weight(a, b, gamma), expected[name])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "epsilon"])
def test_min_snr_weight_is_zero_at_zero_signal(name):
    zero, one = torch.zeros(1), torch.ones(1)
    assert PREDICTIONS[name].min_snr_weight(zero, one, 5.0).item() == 0


def test_epsilon_at_zero_signal_is_refused_and_the_others_are_not():
    x, output = torch.tensor([1.0]), torch.tensor([0.25])
    with pytest.raises(ValueError, match=r"'epsilon' at a=0.0, b=1.0.*undetermined"):
        PREDICTIONS["epsilon"].x0(output, x, 0.0, 1.0)
    found = {name: PREDICTIONS[name].x0(output, x, 0.0, 1.0).item() for name in NAMES if name != "epsilon"}
    assert found == {"v_prediction": -0.25, "sample": 0.25, "flow_prediction": 0.75}


def test_the_sampler_s_epsilon_at_a_level_is_the_noise_that_is_left():
    x0, x = torch.tensor([2.0]), torch.tensor([5.2])
    assert SAMPLE.epsilon(x0, x, 0.6, 0.8).item() == pytest.approx(5.0)
