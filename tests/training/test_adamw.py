"""torch's fused AdamW does with `grad_scale` and `found_inf` what the guarded step relies on."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

LR, DECAY, BETAS, EPS = 0.1, 0.2, (0.9, 0.99), 1e-8


def parameters() -> list[nn.Parameter]:
    """A matrix, and a kernel in channels-last order."""
    random = torch.Generator().manual_seed(0)
    kernel = torch.randn(5, 3, 3, 3, generator=random).to(memory_format=torch.channels_last)
    return [nn.Parameter(torch.randn(4, 3, generator=random)), nn.Parameter(kernel)]


def gradients(step: int, like: Iterable[Tensor]) -> list[Tensor]:
    random = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=random) for p in like]


def adamw(parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True)


def take(
    optimizer: torch.optim.AdamW, parameters: list[nn.Parameter], steps: Iterable[int], skipped: tuple[int, ...] = ()
) -> None:
    for step in steps:
        for parameter, gradient in zip(parameters, gradients(step, parameters), strict=True):
            bad = 8.0 * gradient if step not in skipped else torch.full_like(gradient, torch.nan)
            parameter.grad = torch.empty_like(parameter).copy_(bad)
        optimizer.grad_scale = torch.tensor(8.0)  # type: ignore[attr-defined]
        optimizer.found_inf = torch.tensor(float(step in skipped))  # type: ignore[attr-defined]
        optimizer.step()


@pytest.mark.parametrize("skipped", [(), (0,), (1, 2)])
def test_steps_are_algorithm_2_of_the_scaled_gradients_and_a_bad_one_is_not_taken(skipped: tuple[int, ...]) -> None:
    """Loshchilov & Hutter 2019, in float64."""
    trained = parameters()
    optimizer = adamw(trained)
    take(optimizer, trained, range(5), skipped)
    expected = [p.detach().double() for p in parameters()]
    means, squares = ([torch.zeros_like(p) for p in expected] for _ in range(2))
    good = [step for step in range(5) if step not in skipped]
    for count, step in enumerate(good, start=1):
        for p, m, v, g in zip(expected, means, squares, gradients(step, expected), strict=True):
            m.mul_(BETAS[0]).add_((1 - BETAS[0]) * g.double())
            v.mul_(BETAS[1]).add_((1 - BETAS[1]) * g.double().square())
            p.mul_(1 - LR * DECAY)
            p.sub_(LR * (m / (1 - BETAS[0] ** count)) / ((v / (1 - BETAS[1] ** count)).sqrt() + EPS))
    for p, value in zip(trained, expected, strict=True):
        torch.testing.assert_close(p.detach().double(), value, rtol=1e-5, atol=1e-5)
        assert optimizer.state[p]["step"].item() == len(good)
        assert optimizer.state[p]["exp_avg"].stride() == p.stride()


def test_moments_that_are_copied_into_a_new_optimizer_give_the_same_bits() -> None:
    whole, part = parameters(), parameters()
    take(adamw(whole), whole, range(5))
    first = adamw(part)
    take(first, part, range(3))
    resumed = adamw(part)
    for parameter, state in first.state.items():
        resumed.state[parameter] = {field: torch.empty_like(v).copy_(v) for field, v in state.items()}
    take(resumed, part, range(3, 5))
    assert all(torch.equal(p, q) for p, q in zip(whole, part, strict=True))
