"""AdamW without torch's compiler takes the steps of torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ldm_cli.core.adamw import AdamW


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_steps_are_torchs_to_the_bit(found_inf: float) -> None:
    trained = []
    for optimizer_class in (AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        model = nn.Linear(7, 5)
        optimizer = optimizer_class(model.parameters(), lr=0.1, weight_decay=0.1, fused=True)
        for step in range(3):
            model(torch.randn(4, 7)).square().sum().backward()
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(found_inf if step == 1 else 0.0)
            optimizer.step()
            optimizer.zero_grad()
        trained.append(model)
    ours, theirs = (model.weight for model in trained)
    assert ours.requires_grad
    assert torch.equal(ours, theirs)
