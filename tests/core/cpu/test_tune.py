"""A tuned model has the results, gradients and names of the plain one, and is as open to torch's tools."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ldm_cli.core.cpu import group_norm, linear, tune_for_cpu, upsampling
from ldm_cli.core.models.layers import Upsample2D

from ..models.test_autoencoder_kl import Reconstruction, autoencoder
from ..models.test_clip import small_clip
from ..models.test_unet_2d_condition import inputs, small
from ..models.weights import randomise

CHANNELS_LAST: Any = {"memory_format": torch.channels_last}


class Enlarged(nn.Module):
    """An enlargement to a fixed size."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.layer, self.size = Upsample2D(8), size

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, self.size)  # type: ignore[no-any-return]


LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(256, 300), (3, 150, 256)),
    "linear-narrowing": (lambda: nn.Linear(300, 128), (9, 100, 300)),
    "linear-short": (lambda: nn.Linear(128, 130), (2100, 128)),
    "linear-few-rows": (lambda: nn.Linear(256, 300), (3, 256)),
    "linear-small": (lambda: nn.Linear(8, 12), (3, 7, 8)),
    "linear-one-row": (lambda: nn.Linear(64, 64, bias=False), (64,)),
    "pointwise": (lambda: nn.Conv2d(64, 48, 1), (2, 64, 5, 6)),
    "convolution": (lambda: nn.Conv2d(16, 12, 3, stride=2, padding=(1, 0), groups=2, bias=False), (2, 16, 5, 6)),
    "convolution-same": (lambda: nn.Conv2d(8, 12, 3, padding="same"), (2, 8, 5, 6)),
    "convolution-of-one": (lambda: nn.Conv2d(8, 12, 3, padding=1), (8, 5, 6)),
    "norm-of-one-channel": (lambda: nn.GroupNorm(8, 8), (2, 8, 32, 33)),
    "norm-of-four-channels": (lambda: nn.GroupNorm(4, 16), (2, 16, 32, 33)),
    "norm-of-five-channels": (lambda: nn.GroupNorm(4, 20), (2, 20, 32, 33)),
    "doubled": (lambda: Enlarged((18, 20)), (2, 8, 9, 10)),
    "doubled-small": (lambda: Enlarged((10, 12)), (2, 8, 5, 6)),
    "enlarged": (lambda: Enlarged((17, 20)), (2, 8, 9, 10)),
}


def layer_and_input(name: str, *, channels_last: bool = True) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape) + 1
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.1)
    if channels_last and x.ndim == 4:
        return layer.to(**CHANNELS_LAST), x.to(**CHANNELS_LAST)
    return layer, x


def tuned(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    tune_for_cpu(copied)
    return copied


def gradients(model: nn.Module, x: Tensor, factor: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    return list(torch.autograd.grad((model(x) * factor).sum(), [x, *model.parameters()]))


@pytest.fixture(params=[True, False], ids=["slow MKL", "fast MKL"], autouse=True)
def _mkl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_mkl_is_slow", lambda: request.param)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_results_and_gradients_are_those_of_the_plain_layer(name: str, channels_last: bool) -> None:
    plain, x = layer_and_input(name, channels_last=channels_last)
    ours = tuned(plain)
    expected = plain(x)
    torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-5)
    factor = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    for mine, theirs in zip(gradients(ours, x, factor), gradients(plain, x, factor), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["linear", "linear-narrowing", "linear-short", "norm-of-one-channel", "doubled"])
def test_a_gradient_that_is_not_wanted_is_not_computed_and_the_others_stay(name: str) -> None:
    plain, x = layer_and_input(name)
    ours = tuned(plain)
    factor = torch.randn(plain(x).shape, generator=torch.Generator().manual_seed(1))
    for chosen, expected in enumerate(gradients(plain, x, factor)):
        leaves = [x.clone().requires_grad_(), *ours.parameters()]
        for number, leaf in enumerate(leaves):
            leaf.requires_grad_(number == chosen)
        (ours(leaves[0]) * factor).sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [number == chosen for number in range(len(leaves))]
        torch.testing.assert_close(leaves[chosen].grad, expected, atol=2e-4, rtol=1e-4)
        leaves[chosen].grad = None


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("how", ["autocast", "bfloat16", "float64"])
def test_in_other_types_and_under_autocast_the_plain_layer_runs(name: str, how: str) -> None:
    plain, x = layer_and_input(name)
    if how != "autocast":
        plain, x = plain.to(getattr(torch, how)), x.to(getattr(torch, how))
    x.requires_grad_()  # without, a group norm takes another memory order
    ours = tuned(plain)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        assert torch.equal(ours(x), plain(x))
        assert ours(x).dtype == plain(x).dtype


@pytest.mark.parametrize("name", LAYERS)
def test_a_model_off_the_cpu_stays_as_it_is_and_a_tuned_one_may_leave_it(name: str) -> None:
    plain, x = layer_and_input(name)
    away = copy.deepcopy(plain).to("meta")
    kinds = [type(module) for module in away.modules()]
    tune_for_cpu(away)
    assert [type(module) for module in away.modules()] == kinds
    assert tuned(plain).to("meta")(x.to("meta")).shape == plain(x).shape


def models() -> list[tuple[nn.Module, tuple[Tensor, ...]]]:
    vae, unet, clip = autoencoder(), small(), small_clip()
    for model in (vae, unet, clip):
        randomise(model)
    images, ids = torch.randn(2, 3, 32, 32), torch.arange(10).view(2, 5)
    return [(Reconstruction(vae), (images,)), (unet, inputs()), (clip, (ids, images))]


@pytest.mark.parametrize("number", range(3), ids=["vae", "unet", "clip"])
def test_a_tuned_model_keeps_its_state_dict_and_results_however_often_it_is_tuned(number: int) -> None:
    torch.manual_seed(0)
    plain, given = models()[number]
    ours = tuned(plain)
    kinds = [type(module) for module in ours.modules()]
    tune_for_cpu(ours)
    assert [type(module) for module in ours.modules()] == kinds
    assert kinds != [type(module) for module in plain.modules()]
    assert all(isinstance(mine, type(theirs)) for mine, theirs in zip(ours.modules(), plain.modules(), strict=True))
    state = ours.state_dict()
    assert list(state) == list(plain.state_dict())
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())
    results = [model(*given) for model in (ours, plain, copy.deepcopy(ours))]
    assert_close_all = torch.testing.assert_close
    assert_close_all(results[0], results[1], atol=1e-5, rtol=1e-5)
    assert_close_all(results[2], results[0], atol=0, rtol=0)


@pytest.mark.parametrize("name", [name for name in LAYERS if not name.startswith("enlarged")])
def test_hooks_and_parametrizations_are_heard_of(name: str) -> None:
    plain, x = layer_and_input(name)
    inner = "layer.conv" if isinstance(plain, Enlarged) else ""
    ours = tuned(plain)
    before = ours(x)
    handle = ours.get_submodule(inner).register_forward_hook(lambda _module, _inputs, output: output + 1)
    torch.testing.assert_close(ours(x), before + 1, atol=1e-5, rtol=1e-5)
    handle.remove()

    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    for model in (ours, plain):
        parametrize.register_parametrization(model.get_submodule(inner), "weight", Twice())
    torch.testing.assert_close(ours(x), plain(x), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours(x), before)


def test_the_faster_ways_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    def noted(module: Any, name: str) -> None:
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a: taken.append(name) or function(*a))

    noted(linear, "_by_onednn")
    noted(group_norm, "_group_norm_backward")
    noted(upsampling, "_spread")
    for name, slow_mkl, with_gradient, expected in [
        ("linear", True, True, ["_by_onednn"] * 3),
        ("linear", True, False, ["_by_onednn"]),
        ("linear", False, True, []),
        ("linear", False, False, ["_by_onednn"]),
        ("linear-few-rows", True, True, []),
        ("linear-few-rows", True, False, ["_by_onednn"]),
        ("linear-small", True, True, []),
        ("linear-small", True, False, []),
        ("norm-of-one-channel", False, True, ["_group_norm_backward"]),
        ("norm-of-four-channels", False, True, ["_group_norm_backward"]),
        ("norm-of-five-channels", False, True, []),
        ("doubled", False, True, ["_spread"]),
        ("doubled-small", False, True, []),
        ("enlarged", False, True, []),
    ]:
        monkeypatch.setattr(linear, "_mkl_is_slow", lambda slow_mkl=slow_mkl: slow_mkl)
        layer, x = layer_and_input(name)
        taken.clear()
        with torch.set_grad_enabled(with_gradient):
            y = tuned(layer)(x.requires_grad_())
        if with_gradient:
            y.sum().backward()
        assert taken == expected, name


def test_mkl_is_taken_for_slow_by_the_makers_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    def judged(instructions: str, maker: str) -> bool:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
        monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"processor : 0\nvendor_id : {maker}\n")
        return linear._mkl_is_slow.__wrapped__()

    assert judged("AVX512", "AuthenticAMD")
    assert not judged("AVX512", "GenuineIntel")
    assert not judged("AVX2", "AuthenticAMD")


@torch.no_grad()
@pytest.mark.parametrize(("channels", "side", "size"), [(64, 16, 3), (256, 4, 1), (256, 4, 3), (512, 2, 1)])
def test_convolutions_do_not_see_the_size_of_the_batch(channels: int, side: int, size: int) -> None:
    torch.manual_seed(0)
    layer = tuned(nn.Conv2d(channels, channels, size, padding=size // 2).to(**CHANNELS_LAST))
    images = torch.randn(16, channels, side, side).to(**CHANNELS_LAST)
    together = layer(images)
    assert all(torch.equal(layer(images[:count].clone(**CHANNELS_LAST)), together[:count]) for count in (1, 2, 3, 8))


@torch.no_grad()
def test_large_linear_layers_do_not_see_the_size_of_the_batch() -> None:
    torch.manual_seed(0)
    layer, rows = tuned(nn.Linear(1024, 256)), torch.randn(256, 1024)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)  # MKL's order of adding depends on the rows with several threads
    try:
        together = layer(rows)
        assert all(torch.equal(layer(rows[:count].clone()), together[:count]) for count in (16, 32, 48, 96, 160))
    finally:
        torch.set_num_threads(num_threads)


def test_a_group_norm_is_trained_where_its_input_needs_no_gradient() -> None:
    """torch's own backward pass crashes there in channels-last order: a frozen layer before a trained norm."""
    norm, plain = nn.GroupNorm(8, 32), nn.GroupNorm(8, 32)
    tune_for_cpu(norm)
    x, upstream = torch.randn(2, 4, 32, 8, 8).unbind()
    norm(x.to(memory_format=torch.channels_last)).backward(upstream)
    plain(x).backward(upstream)
    torch.testing.assert_close(norm.weight.grad, plain.weight.grad)
