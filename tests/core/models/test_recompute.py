"""What is computed again in the backward pass gives the numbers of plain layers, and keeps less."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_cli.core.models.recompute import geglu_linear
from tests.core.models.layer_checks import assert_same, kept_bytes


def test_geglu_and_linear_are_those_of_torch() -> None:
    torch.manual_seed(0)
    proj, out = nn.Linear(6, 20), nn.Linear(10, 6)

    def plain(x: Tensor) -> Tensor:
        value, gate = proj(x).chunk(2, dim=-1)
        result: Tensor = out(value * F.gelu(gate))
        return result

    x = torch.randn(2, 5, 6).requires_grad_()
    assert_same(lambda x: geglu_linear(x, proj, out), plain, x, nn.ModuleList([proj, out]))


def test_of_a_feed_forward_layer_two_of_four_activations_are_kept() -> None:
    proj, out = nn.Linear(32, 256), nn.Linear(128, 32)
    x = torch.randn(2, 64, 32).requires_grad_()
    weights = proj.weight.nbytes + out.weight.nbytes

    def plain() -> Tensor:
        value, gate = proj(x).chunk(2, dim=-1)
        result: Tensor = out(value * F.gelu(gate))
        return result

    both = x.nbytes * 8
    assert kept_bytes(lambda: geglu_linear(x, proj, out)) <= x.nbytes + both + weights
    assert kept_bytes(plain) >= x.nbytes + 2 * both + weights
