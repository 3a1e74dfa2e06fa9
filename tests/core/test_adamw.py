"""AdamW takes the steps of torch's own, with one count for all parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ldm_cli.core.adamw import AdamW


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 1), nn.Flatten(), nn.Linear(4, 2))
    return layers.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices that decay, and vectors that do not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]


def train(
    model: nn.Module, optimizer: Any, steps: range, skipped: int | None = None, frozen: int | None = None
) -> None:
    """Steps on random images; in `skipped` nothing is to move, in `frozen` the first layer has no gradient."""
    for step in steps:
        torch.manual_seed(step)
        model(torch.randn(6, 3, 3, 3)).square().sum().backward()
        if step == frozen:
            next(model.parameters()).grad = None
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(float(step == skipped))
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(("skipped", "frozen"), [(None, None), (1, None), (None, 0), (2, 1), (1, 1)])
def test_steps_are_torchs_to_the_bit(skipped: int | None, frozen: int | None) -> None:
    ours, theirs = network(), network()
    mine, torchs = AdamW(groups(ours), lr=0.1), torch.optim.AdamW(groups(theirs), lr=0.1, fused=True)
    for model, optimizer in ((ours, mine), (theirs, torchs)):
        train(model, optimizer, range(4), skipped, frozen)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert p.requires_grad
        assert torch.equal(p, q)
        for field, value in torchs.state[q].items():
            assert torch.equal(mine.state[p][field], value), field
        assert mine.state[p]["exp_avg"].stride() == p.stride()


def test_state_that_is_put_in_its_place_is_gone_on_from() -> None:
    whole, part = network(), network()
    straight, first = AdamW(groups(whole), lr=0.1), AdamW(groups(part), lr=0.1)
    train(whole, straight, range(5))
    train(part, first, range(3))
    resumed = AdamW(groups(part), lr=0.1)
    for parameter, state in first.state.items():
        for field, value in state.items():
            resumed.state[parameter][field] = value.clone()
    train(part, resumed, range(3, 5))
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), part.parameters(), strict=True))
    assert {float(state["step"]) for state in resumed.state.values()} == {5.0}
    assert {float(state["step"]) for state in first.state.values()} == {3.0}
