"""The module at which values cease to be finite is named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ldm_cli.core.first_nonfinite import first_nonfinite


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (
            nn.Linear(2, 2),
            nn.Sequential(nn.Linear(2, 2), nn.ReLU()),
            nn.Linear(2, 2),
        )

    def forward(self, x: torch.Tensor) -> dict[str, tuple[torch.Tensor, ...]]:
        return {"states": (self.third(self.second(self.first(x))),)}


@pytest.mark.parametrize("name", ["first", "second.0", "third"])
def test_the_innermost_module_that_gives_it_is_named(name: str) -> None:
    net = Net()
    with torch.no_grad():
        net.get_submodule(name).bias.fill_(float("inf"))  # type: ignore[union-attr,operator]
    assert first_nonfinite({"unet": net}, lambda: net(torch.ones(1, 2))) == f"the output of unet.{name}"


def test_of_a_bad_input_the_first_module_that_gets_it_is_named() -> None:
    net = Net()
    assert first_nonfinite({"unet": net}, lambda: net(torch.full((1, 2), torch.nan))) == "the input of unet.first"


def test_a_sound_computation_has_none_and_nothing_stays_on_the_modules() -> None:
    net = Net()
    assert first_nonfinite({"unet": net}, lambda: net(torch.ones(1, 2))) == ""
    assert not any(module._forward_hooks for module in net.modules())


def test_a_computation_that_fails_on_the_way_is_still_told_of() -> None:
    net = Net()
    with torch.no_grad():
        net.first.bias.fill_(torch.nan)

    def fail() -> None:
        net(torch.ones(1, 2))
        raise RuntimeError("later")

    assert first_nonfinite({"unet": net}, fail) == "the output of unet.first"
