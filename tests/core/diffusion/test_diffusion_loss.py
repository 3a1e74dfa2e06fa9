import pytest
import torch

from ldm_cli.core.diffusion.config import DiffusionConfig
from ldm_cli.core.diffusion.loss import add_noise, diffusion_loss
from ldm_cli.core.diffusion.prediction import EPSILON, PREDICTIONS
from ldm_cli.core.diffusion.process import process_of


def draw(prediction_type):
    generator = torch.Generator().manual_seed(1)
    process = process_of(DiffusionConfig(prediction_type=prediction_type))
    x0, noise = torch.randn(2, 4, 3, 6, 6, generator=generator, dtype=torch.float64)
    a, b, _ = process.at(torch.tensor([0.0005, 0.2505, 0.7005, 0.9995]))
    return process.prediction, x0, noise, a, b


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_a_perfect_prediction_has_no_loss(prediction_type):
    prediction, x0, noise, a, b = draw(prediction_type)
    target = prediction.target(x0, noise, *(values.view(4, 1, 1, 1) for values in (a, b)))
    assert diffusion_loss(prediction, target, x0, noise, a, b, 5.0).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_min_snr_loss_is_the_same_function_of_the_x0_error_for_every_prediction_type(prediction_type):
    prediction, x0, noise, a, b = draw(prediction_type)
    gamma = 5.0
    rows = [values.view(4, 1, 1, 1) for values in (a, b)]
    target = prediction.target(x0, noise, *rows)
    output = target + 0.1 * torch.randn(target.shape, generator=torch.Generator().manual_seed(2), dtype=target.dtype)
    x0_hat = prediction.x0(output, add_noise(x0, noise, a, b), *rows)
    x0_error = (x0_hat - x0).square().flatten(1).mean(1)
    expected = (a**2 / b**2).clamp(max=gamma) * x0_error
    loss = diffusion_loss(prediction, output, x0, noise, a, b, gamma)
    assert loss.shape == (4,)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_plain_loss_is_the_mean_squared_error_per_sample():
    _, x0, noise, a, b = draw("epsilon")
    loss = diffusion_loss(EPSILON, noise + torch.arange(4.0).view(4, 1, 1, 1), x0, noise, a, b)
    torch.testing.assert_close(loss, torch.tensor([0.0, 1.0, 4.0, 9.0]))


def test_noised_samples_keep_the_type_of_the_samples_at_levels_in_float64():
    _, x0, noise, a, b = draw("epsilon")
    noised = add_noise(x0.float(), noise.float(), a, b)
    assert noised.dtype == torch.float32
    expected = a.view(4, 1, 1, 1) * x0 + b.view(4, 1, 1, 1) * noise
    torch.testing.assert_close(noised.double(), expected, rtol=0, atol=1e-6)


def test_levels_of_another_batch_size_are_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"\(2,\).*\(3, 4\)"):
        add_noise(torch.zeros(3, 4), torch.zeros(3, 4), torch.ones(2), torch.ones(2))


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_a_mask_weighs_positions_and_leaves_no_gradient_where_it_is_zero(gamma):
    prediction, x0, noise, a, b = draw("v_prediction")
    generator = torch.Generator().manual_seed(3)
    output = torch.randn(4, 3, 6, 6, generator=generator, requires_grad=True)
    mask = torch.tensor([0.0, 0.25, 1.0])[torch.randint(3, (4, 1, 6, 6), generator=generator)]
    plain, masked = (diffusion_loss(prediction, output, x0, noise, a, b, gamma, m) for m in (None, mask))
    (whole,) = torch.autograd.grad(plain.sum(), output)
    (part,) = torch.autograd.grad(masked.sum(), output)
    assert (part[(mask == 0).expand_as(part)] == 0).all()
    torch.testing.assert_close(part, whole * mask)
    assert torch.equal(diffusion_loss(prediction, output, x0, noise, a, b, gamma, torch.ones_like(mask)), plain)
