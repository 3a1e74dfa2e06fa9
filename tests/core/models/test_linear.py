"""Linear layers are those of torch, by MKL or by oneDNN, and the large ones do not see the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from ldm_cli.core.models import linear as linear_module
from ldm_cli.core.models.linear import Linear, linear


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs", [4, 512])
def test_linear_layers_are_those_of_torch(
    outputs: int, bias: bool, gelu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_module, "_mkl_is_slow", lambda: False)
    torch.manual_seed(0)
    layer, x = Linear(128, outputs, bias=bias), torch.randn(3, 7, 256)[..., ::2]
    plain = F.linear(x, layer.weight, layer.bias)
    with torch.no_grad():
        assert torch.equal(layer(x), linear(x, layer.weight, layer.bias))
        drawn = linear(x, layer.weight, layer.bias, gelu=gelu)
    expected = F.gelu(plain) if gelu else plain
    torch.testing.assert_close(drawn, expected.detach(), atol=1e-5, rtol=1e-5)
    assert torch.equal(linear(x, layer.weight, layer.bias, gelu=gelu), expected), "with gradients torch's own layer"
    transposed = torch.randn(512, outputs).t()[:, :128]
    with torch.no_grad():
        torch.testing.assert_close(linear(x, transposed, None), F.linear(x, transposed), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("slow_mkl", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(8, 12), (64, 64), (64, 300), (300, 64), (256, 256)])
def test_gradients_of_linear_layers_are_those_of_torch(
    inputs: int, outputs: int, slow_mkl: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[object] = []
    monkeypatch.setattr(linear_module, "_mkl_is_slow", lambda: slow_mkl)
    by_onednn = linear_module._by_onednn
    monkeypatch.setattr(linear_module, "_by_onednn", lambda *a, **k: used.append(a) or by_onednn(*a, **k))
    torch.manual_seed(0)
    layer, x = Linear(inputs, outputs), torch.randn(5, inputs, 7).mT.requires_grad_()
    assert layer.bias is not None
    wanted = [x, layer.weight, layer.bias]
    for shape in [(5, 7, outputs), (1, 1, outputs)]:  # the second: a gradient without memory of its own
        factor = torch.randn(shape)
        ours, theirs = layer(x), F.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        gradients = [torch.autograd.grad(y, wanted, factor.expand_as(y)) for y in (ours, theirs)]
        for mine, torchs in zip(*gradients, strict=True):
            torch.testing.assert_close(mine, torchs, atol=1e-4, rtol=1e-4)
    assert bool(used) is (slow_mkl and inputs > 8)
    for frozen in range(2):
        (mine,) = torch.autograd.grad(layer(x).sum(), wanted[1 - frozen])
        (torchs,) = torch.autograd.grad(F.linear(x, layer.weight, layer.bias).sum(), wanted[1 - frozen])
        torch.testing.assert_close(mine, torchs, atol=1e-4, rtol=1e-4)


def test_mkl_is_taken_for_slow_by_the_makers_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def judged(instructions: str, maker: str) -> bool:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
        monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"processor : 0\nvendor_id : {maker}\n")
        return linear_module._mkl_is_slow.__wrapped__()

    assert judged("AVX512", "AuthenticAMD")
    assert not judged("AVX512", "GenuineIntel")
    assert not judged("AVX2", "AuthenticAMD")


@torch.no_grad()
def test_large_linear_layers_do_not_see_the_size_of_the_batch() -> None:
    torch.manual_seed(0)
    layer, rows = Linear(1024, 256), torch.randn(256, 1024)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)  # MKL's order of adding depends on the rows with several threads
    try:
        together = layer(rows)
        assert all(torch.equal(layer(rows[:count].clone()), together[:count]) for count in (16, 32, 48, 96, 160))
    finally:
        torch.set_num_threads(num_threads)
