"""Norms and convolutions that are computed in other ways give the numbers of plain layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ldm_cli.core.models import group_norm
from ldm_cli.core.models.convolution import conv3x3, norm_silu_conv, upsample_conv
from tests.core.models.layer_checks import assert_same, kept_bytes, norm_and_conv, random_map


@pytest.mark.parametrize("side", [1, 3, 6])
@pytest.mark.parametrize(("channels", "out_channels"), [(8, 12), (64, 24)])
@pytest.mark.parametrize("channels_last", [True, False])
def test_norm_silu_and_convolution_are_those_of_torch(
    side: int, channels: int, out_channels: int, channels_last: bool
) -> None:
    norm, conv, both = norm_and_conv(channels, out_channels)
    x = random_map(channels, side, channels_last=channels_last)
    assert_same(lambda x: norm_silu_conv(x, norm, conv), lambda x: conv(F.silu(norm(x))), x, both)


def test_enlargement_and_convolution_are_those_of_torch() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 6, 3, padding=1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    plain = lambda x: conv(F.interpolate(x, size=(7, 9), mode="nearest"))  # noqa: E731
    assert_same(lambda x: upsample_conv(x, (7, 9), conv), plain, random_map(8, 4), conv)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("side", "odd", "one_convolution"), [(9, 0, True), (9, 1, False), (5, 0, False)])
def test_enlargement_by_two_and_convolution_are_those_of_torch(
    side: int, odd: int, one_convolution: bool, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 6, 3, padding=1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    size = (2 * side - odd, 2 * side + 2)
    plain = lambda x: conv(F.interpolate(x, size=size, mode="nearest"))  # noqa: E731
    x = random_map(8, side, channels_last=channels_last)
    assert_same(lambda x: upsample_conv(x, size, conv), plain, x, conv)
    enlarged: list[object] = []
    monkeypatch.setattr(F, "interpolate", lambda *a, **k: enlarged.append(a) or torch.zeros(3, 8, *size))
    upsample_conv(x, size, conv)
    assert bool(enlarged) is not one_convolution


@pytest.mark.parametrize("channels", [4, 8, 20])
def test_norms_of_large_maps_are_those_of_torch(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 groups: of 1, 2 and 5 channels, the last beyond what our own backward pass is for."""
    calls: list[int] = []
    own = group_norm._group_norm_backward
    monkeypatch.setattr(group_norm, "_group_norm_backward", lambda *a: calls.append(1) or own(*a))
    norm, conv, both = norm_and_conv(channels, 6)
    x = random_map(channels, 32)
    with torch.no_grad():
        x.mul_(3).add_(5)
    assert_same(lambda x: norm_silu_conv(x, norm, conv), lambda x: conv(F.silu(norm(x))), x, both)
    assert bool(calls) is (channels < 20)


def test_of_an_enlargement_the_small_map_alone_is_kept() -> None:
    conv = nn.Conv2d(32, 32, 3, padding=1)
    x = random_map(32, 7)
    for size in [(14, 16), (13, 16)]:
        ours = kept_bytes(lambda size=size: upsample_conv(x, size, conv))
        assert ours <= x.nbytes + 16 / 9 * conv.weight.nbytes
        assert kept_bytes(lambda size=size: conv(F.interpolate(x, size=size, mode="nearest"))) > 3 * x.nbytes


@pytest.mark.parametrize("side", [3, 9])
@pytest.mark.parametrize("enlarged", [None, 0, 1])
def test_gradients_that_nobody_wants_are_not_computed(side: int, enlarged: int | None) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(64, 8, 3, padding=1), random_map(64, side)

    def plain_and_ours() -> tuple[torch.Tensor, torch.Tensor]:
        if enlarged is None:
            return conv(x), conv3x3(x, conv)
        size = (2 * side - enlarged, 2 * side + 2)
        return conv(F.interpolate(x, size=size, mode="nearest")), upsample_conv(x, size, conv)

    wanted = [x, conv.weight, conv.bias]
    for chosen in wanted:
        assert chosen is not None
        for tensor in wanted:
            assert tensor is not None
            tensor.requires_grad_(tensor is chosen)
        plain, ours = plain_and_ours()
        found = ours.grad_fn.apply(torch.ones_like(ours))[:3]  # type: ignore[misc]
        assert [gradient is not None for gradient in found] == [tensor is chosen for tensor in wanted]
        (expected,) = torch.autograd.grad(plain.sum(), chosen)
        torch.testing.assert_close(next(g for g in found if g is not None), expected, atol=1e-4, rtol=1e-4)


def test_under_autocast_the_plain_layers_run() -> None:
    norm, conv, _ = norm_and_conv(64, 8)
    x = random_map(64, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm_silu_conv(x, norm, conv).dtype == torch.bfloat16
        torch.testing.assert_close(norm_silu_conv(x, norm, conv), conv(F.silu(norm(x))), atol=0, rtol=0)
