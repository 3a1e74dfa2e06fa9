import pytest
import torch

from ldm_cli.core.diffusion.process import Level
from ldm_cli.lesson import measures
from ldm_cli.lesson.spiral import data_set, point_at


def test_the_best_prediction_is_the_gradient_of_the_log_density():
    """Tweedie: a E[x_0 | x] = x + b² ∇ log p(x), here by autograd of the mixture's density."""
    level, data = Level(60.0, 0.8, 0.6), torch.randn(7, 2, generator=torch.Generator().manual_seed(0)).double()
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    log_density = torch.logsumexp(-((x[:, None] - 0.8 * data) ** 2).sum(dim=2) / (2 * 0.36), dim=1)
    (score,) = torch.autograd.grad(log_density.sum(), x)
    expected = (x + 0.36 * score) / 0.8
    assert torch.allclose(measures.best_x0(x.detach(), level, data), expected.detach())


def test_arrows_of_the_best_prediction_have_cosine_one_and_turn_from_the_mean_to_the_nearest():
    data = data_set(500, 0).xy
    generator = torch.Generator().manual_seed(0)
    cosines = []
    for noise in (0.05, 0.9999):
        level = Level(0.0, (1 - noise**2) ** 0.5, noise)
        x = level.signal * data + noise * torch.randn(data.shape, generator=generator)
        cosines.append(measures.directions(x, measures.best_x0(x, level, data), level, data))
    assert [c["learned_to_best"] for c in cosines] == pytest.approx([1.0, 1.0])
    assert cosines[0]["best_to_nearest"] > 0.8 > 0.5 > cosines[0]["best_to_mean"]
    assert cosines[1]["best_to_mean"] > 0.999


def test_data_described_by_themselves_are_perfect_and_a_single_point_is_not():
    data = data_set(400, 0).xy
    own = measures.describe(data, data)
    assert own["energy_distance"] == pytest.approx(0.0, abs=1e-9)
    assert own["spread"] == pytest.approx(2**0.5, abs=0.01)
    assert (own["arm_covered"], own["near_middle"]) == (1.0, pytest.approx(0.25, abs=0.01))
    collapsed = measures.describe(torch.zeros(50, 2), data)
    assert (collapsed["spread"], collapsed["near_middle"], collapsed["arm_covered"]) == (0.0, 1.0, 0.05)
    assert collapsed["energy_distance"] > 0.5


def test_points_in_the_middle_of_their_class_are_in_it_and_others_are_not():
    labels = torch.arange(9) % 3
    middles = point_at((labels + 0.5) / 3)
    right = measures.describe_classes(middles, labels)
    assert (right["in_class"], right["class_spread"]) == (1.0, pytest.approx(0.0, abs=1e-3))
    assert measures.describe_classes(middles, labels.roll(1))["in_class"] == 0.0
