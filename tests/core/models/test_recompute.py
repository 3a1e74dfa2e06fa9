"""What is computed again in the backward pass gives the numbers of plain layers, and keeps less."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_cli.core.models import recompute
from ldm_cli.core.models.recompute import geglu_linear, norm_silu_conv, upsample_conv

Layer = Callable[[Tensor], Tensor]


def random_map(channels: int, side: int, *, channels_last: bool = True) -> Tensor:
    x = torch.randn(3, channels, side, side + 1, generator=torch.Generator().manual_seed(1))
    order = torch.channels_last if channels_last else torch.contiguous_format
    return x.to(memory_format=order).requires_grad_()


def norm_and_conv(channels: int, out_channels: int) -> tuple[nn.GroupNorm, nn.Conv2d, nn.ModuleList]:
    torch.manual_seed(0)
    norm, conv = nn.GroupNorm(4, channels), nn.Conv2d(channels, out_channels, 3, padding=1)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm, conv, nn.ModuleList([norm, conv]).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def assert_same(ours: Layer, plain: Layer, x: Tensor, module: nn.Module) -> None:
    """Results and all gradients are equal up to rounding."""
    wanted = [x, *module.parameters()]
    results = [ours(x), plain(x)]
    weight = torch.randn(results[1].shape, generator=torch.Generator().manual_seed(2))
    gradients = [torch.autograd.grad((result * weight).sum(), wanted) for result in results]
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), results[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", [1, 3, 6])
@pytest.mark.parametrize(("channels", "out_channels"), [(8, 12), (64, 24)])
@pytest.mark.parametrize("channels_last", [True, False])
def test_norm_silu_and_convolution_are_those_of_torch(
    side: int, channels: int, out_channels: int, channels_last: bool
) -> None:
    norm, conv, both = norm_and_conv(channels, out_channels)
    x = random_map(channels, side, channels_last=channels_last)
    assert_same(lambda x: norm_silu_conv(x, norm, conv), lambda x: conv(F.silu(norm(x))), x, both)


@pytest.mark.parametrize("channels", [4, 8, 20])
def test_norms_of_large_maps_are_those_of_torch(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 groups: of 1, 2 and 5 channels, the last beyond what our own backward pass is for."""
    calls: list[int] = []
    own = recompute._group_norm_backward
    monkeypatch.setattr(recompute, "_group_norm_backward", lambda *a: calls.append(1) or own(*a))
    norm, conv, both = norm_and_conv(channels, 6)
    x = random_map(channels, 32)
    with torch.no_grad():
        x.mul_(3).add_(5)
    assert_same(lambda x: norm_silu_conv(x, norm, conv), lambda x: conv(F.silu(norm(x))), x, both)
    assert bool(calls) is (channels < 20)


def test_enlargement_and_convolution_are_those_of_torch() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 6, 3, padding=1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    plain = lambda x: conv(F.interpolate(x, size=(7, 9), mode="nearest"))  # noqa: E731
    assert_same(lambda x: upsample_conv(x, (7, 9), conv), plain, random_map(8, 4), conv)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("side", "one_convolution"), [(9, True), (5, False)])
def test_enlargement_by_two_and_convolution_are_those_of_torch(
    side: int, one_convolution: bool, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 6, 3, padding=1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    size = (2 * side, 2 * side + 2)
    plain = lambda x: conv(F.interpolate(x, size=size, mode="nearest"))  # noqa: E731
    x = random_map(8, side, channels_last=channels_last)
    assert_same(lambda x: upsample_conv(x, size, conv), plain, x, conv)
    enlarged: list[object] = []
    monkeypatch.setattr(F, "interpolate", lambda *a, **k: enlarged.append(a) or torch.zeros(3, 8, *size))
    upsample_conv(x, size, conv)
    assert bool(enlarged) is not one_convolution


def test_geglu_and_linear_are_those_of_torch() -> None:
    torch.manual_seed(0)
    proj, out = nn.Linear(6, 20), nn.Linear(10, 6)

    def plain(x: Tensor) -> Tensor:
        value, gate = proj(x).chunk(2, dim=-1)
        result: Tensor = out(value * F.gelu(gate))
        return result

    x = torch.randn(2, 5, 6).requires_grad_()
    assert_same(lambda x: geglu_linear(x, proj, out), plain, x, nn.ModuleList([proj, out]))


def kept_bytes(do: Callable[[], object]) -> int:
    """Bytes of distinct tensors that autograd keeps for the backward pass."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        alive = do()
    del alive
    return sum(kept.values())


def test_two_thirds_of_the_activations_of_a_norm_a_silu_and_a_convolution_are_kept() -> None:
    norm, conv, _ = norm_and_conv(32, 32)
    x = random_map(32, 16)
    weights = conv.weight.nbytes
    ours = kept_bytes(lambda: norm_silu_conv(x, norm, conv)) - weights
    plain = kept_bytes(lambda: conv(F.silu(norm(x)))) - weights
    assert ours < 2.1 * x.nbytes
    assert plain > 2.9 * x.nbytes


def test_under_autocast_the_plain_layers_run() -> None:
    norm, conv, _ = norm_and_conv(64, 8)
    x = random_map(64, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm_silu_conv(x, norm, conv).dtype == torch.bfloat16
        torch.testing.assert_close(norm_silu_conv(x, norm, conv), conv(F.silu(norm(x))), atol=0, rtol=0)
