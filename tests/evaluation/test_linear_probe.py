"""The linear probe, against other minimisers of the same sum and where the best classifier is known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_cli.evaluation import linear_probe as module
from ldm_cli.evaluation.linear_probe import fit_logistic, linear_probe


def clusters(count: int, spread: float, seed: int, width: int = 6) -> tuple[Tensor, Tensor]:
    """Three classes around the first three axes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    return torch.eye(3, width)[labels] + spread * torch.randn(count, width, generator=generator), labels


@pytest.mark.parametrize("l2", [0.03, 1.0, 30.0])
def test_the_fit_is_the_minimum_that_newtons_method_finds(l2: float) -> None:
    features, labels = clusters(60, 0.5, 0)
    features = features.double()

    def objective(parameters: Tensor) -> Tensor:
        weight, bias = parameters[:-3].view(3, -1), parameters[-3:]
        # The bias is free but for a shift of all classes; this fixes the shift and changes nothing else.
        loss = F.cross_entropy(features @ weight.T + bias, labels, reduction="sum")
        return loss + l2 / 2 * weight.square().sum() + bias.mean() ** 2

    parameters = torch.zeros(3 * features.shape[1] + 3, dtype=torch.float64)
    for _ in range(30):
        gradient = torch.func.grad(objective)(parameters)
        parameters = parameters - torch.linalg.solve(torch.func.hessian(objective)(parameters), gradient)
    weight, bias = fit_logistic(features, labels, 3, l2)
    torch.testing.assert_close(weight, parameters[:-3].view(3, -1), atol=2e-4, rtol=0)
    torch.testing.assert_close(bias - bias.mean(), parameters[-3:], atol=2e-4, rtol=0)


def test_two_points_have_the_slope_of_the_closed_form() -> None:
    """x = ±1 and weights ±w: the derivative of 2 log(1 + exp(-2w)) + l2 w² is zero at l2 w = 2 / (1 + exp(2w))."""
    weight, _ = fit_logistic(torch.tensor([[1.0], [-1.0]]).double(), torch.tensor([0, 1]), 2, 0.5)
    w = float(weight[0, 0])
    assert 0.5 * w == pytest.approx(2 / (1 + torch.tensor(2 * w).exp().item()), abs=1e-5)
    assert float(weight[1, 0]) == pytest.approx(-w, abs=1e-6)


def test_separable_classes_are_told_apart_and_classes_count_alike() -> None:
    train, test = clusters(90, 0.05, 0), clusters(30, 0.05, 1)
    assert linear_probe(*train, *test)["top1"] == 1.0
    features, labels = test[0], test[1].clone()
    labels[labels == 2] = 1  # one class holds two thirds; the half of it that was 2 is predicted as 2
    found = linear_probe(*train, features, labels)
    assert (found["top1"], found["per_class"]) == pytest.approx((2 / 3, 0.75))


def test_the_penalty_is_chosen_on_held_out_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features of noise alone need the strongest shrinking that the held-out samples ask for, on the finest grid."""
    fitted = []
    fit = module.fit_logistic

    def noted(features: Tensor, labels: Tensor, num_classes: int, l2: float) -> tuple[Tensor, Tensor]:
        fitted.append((len(features), l2))
        return fit(features, labels, num_classes, l2)

    monkeypatch.setattr(module, "fit_logistic", noted)
    found = linear_probe(*clusters(50, 1.5, 0, width=40), *clusters(30, 1.5, 1, width=40))
    assert {size for size, _ in fitted[:-1]} == {40}
    assert fitted[-1] == (50, found["l2"])
    assert len(fitted) - 1 <= 7 + 2 * 4
    assert {round(float(torch.tensor(l2).log10()), 3) for _, l2 in fitted[:7]} == {-6, -4, -2, 0, 2, 4, 6}
