"""Adapters on layers that are tuned for the CPU, and on compiled ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ldm_cli.core.cpu import tune_for_cpu
from ldm_cli.core.low_rank import LowRank
from ldm_cli.families.adapted import AdaptedNetworks


@pytest.mark.parametrize("is_compiled", [False, True])
def test_layers_compute_with_the_weights_of_the_moment(is_compiled: bool) -> None:
    network = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(512, 64)).requires_grad_(False)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    tune_for_cpu(network)
    if is_compiled:
        network.compile(backend="aot_eager", dynamic=False, fullgraph=True)
    generator = torch.Generator().manual_seed(0)

    def update(*down: int) -> LowRank:
        up = torch.randn(down[0] * 8 if len(down) == 2 else 8, 2, generator=generator)
        return LowRank(torch.randn(2, *down[1:], generator=generator), up, 1.0)

    adapters = {"a": {"net": {"0": update(1, 8, 3, 3), "2": update(8, 512)}}}
    adapted, x = AdaptedNetworks({"net": network}, adapters), torch.randn(2, 8, 8, 8, generator=generator)
    with torch.inference_mode():
        before = network(x)
        adapted.use({"a": 0.5})
        found = network(x)
        weights = {
            name: adapters["a"]["net"][name].applied(adapted_base, 0.5)
            for name, adapted_base in bases(adapted, network)
        }
        hidden = nn.functional.conv2d(x, weights["0"], network[0].bias, padding=1).flatten(1)
        expected = nn.functional.linear(hidden, weights["2"], network[2].bias)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-5)
        adapted.use({})
        assert torch.equal(network(x), before)


def bases(adapted: AdaptedNetworks, network: nn.Sequential) -> list[tuple[str, torch.Tensor]]:
    return [(name, adapted._base[network[int(name)].weight]) for name in "02"]


def test_several_updates_of_a_weight_all_begin_at_the_base() -> None:
    generator = torch.Generator().manual_seed(1)
    layer = nn.Linear(4, 6).requires_grad_(False)
    base, magnitude = layer.weight.clone(), torch.arange(1.0, 7.0)
    updates = {
        name: LowRank(torch.randn(2, 4, generator=generator), torch.randn(6, 2, generator=generator), 2.0, norms)
        for name, norms in (("a", magnitude), ("b", 2 * magnitude), ("c", None))
    }
    adapted = AdaptedNetworks({"net": nn.Sequential(layer)}, {name: {"net": {"0": u}} for name, u in updates.items()})
    adapted.use({"c": 0.5, "b": 1.0, "a": 1.0})
    rows = {name: base + updates[name].up @ updates[name].down for name in "ab"}
    directions = {name: row / row.norm(dim=1, keepdim=True) for name, row in rows.items()}
    with_norms = magnitude[:, None] * (directions["a"] + 2 * directions["b"])
    expected = with_norms - base + 0.5 * updates["c"].up @ updates["c"].down
    torch.testing.assert_close(layer.weight, expected)
