"""Layers beside those of torch: results, gradients, and what autograd keeps of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

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
