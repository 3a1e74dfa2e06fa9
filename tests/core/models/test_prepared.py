"""What is made of weights: once, of the right ones, with the same products bit for bit, and not without bounds."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

from ldm_cli.core.models import linear as linear_module
from ldm_cli.core.models import prepared
from ldm_cli.core.models.convolution import conv3x3, upsample_conv
from ldm_cli.core.models.linear import linear
from ldm_cli.core.models.prepared import PreparedWeights, prepared_weights


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Counter:
    """Makes twice the weight, and counts."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.times = weight, 0

    def __call__(self) -> Tensor:
        self.times += 1
        return 2 * self.weight


def test_a_weight_is_prepared_once_for_each_way_and_view() -> None:
    store, weight = PreparedWeights(), torch.randn(4, 6)
    make = Counter(weight)
    assert store.get(weight, "a", make) is store.get(weight, "a", make)
    assert store.get(weight.view(4, 6), "a", make) is store.get(weight, "a", make)
    assert make.times == 1
    store.get(weight, "b", make)
    store.get(weight[:2], "a", make)
    store.get(weight.t(), "a", make)
    store.get(torch.randn(4, 6), "a", make)
    assert make.times == 5
    square = torch.randn(5, 5)
    assert store.get(square, "a", Counter(square)) is not store.get(square.t(), "a", Counter(square.t()))


def test_a_weight_that_is_gone_is_not_taken_for_another_one() -> None:
    store = PreparedWeights()
    for value in range(20):
        weight = torch.full((64, 64), float(value))  # where the last one lay, if that was freed
        assert store.get(weight, "a", Counter(weight))[0, 0] == 2 * value


def test_what_has_no_room_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "_MOST_BYTES", 100)
    store, small, large = PreparedWeights(), torch.zeros(20), torch.zeros(30)
    for weight, times in ((small, 1), (large, 3), (small[:5], 1), (small[:1], 3)):
        make = Counter(weight)
        for _ in range(3):
            store.get(weight, "a", make)
        assert make.times == times


def test_a_store_is_in_use_within_its_context_and_thread() -> None:
    outer, inner = PreparedWeights(), PreparedWeights()
    seen: list[PreparedWeights | None] = []
    with outer.in_use():
        with inner.in_use():
            seen.append(prepared_weights())
        seen.append(prepared_weights())
        thread = threading.Thread(target=lambda: seen.append(prepared_weights()))
        thread.start()
        thread.join()
    assert seen == [inner, outer, None]
    assert prepared_weights() is None


@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("is_slow", [True, False])
@torch.inference_mode()
def test_linear_layers_give_the_same_bits(rows: int, is_slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "_mkl_is_slow", lambda: is_slow)
    store, x = PreparedWeights(), torch.randn(rows, 20, 256)
    for outputs, gelu in ((8, False), (128, False), (320, False), (320, True)):
        weight, bias = torch.randn(outputs, 256), torch.randn(outputs)
        plain = linear(x, weight, bias, gelu=gelu)
        with store.in_use():
            again = [linear(x, weight, bias, gelu=gelu) for _ in range(2)]
        assert all(torch.equal(plain, result) for result in again)
    assert len(store._made) == (4 if is_slow else 3)


@torch.inference_mode()
def test_a_weight_is_brought_into_blocks_for_each_number_of_rows() -> None:
    store, weight = PreparedWeights(), torch.randn(256, 256)
    with store.in_use():
        for rows in (4, 50, 4, 50):
            linear(torch.randn(rows, 256), weight, None)
    assert len(store._made) == 2


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("side", [4, 8, 12])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@torch.inference_mode()
def test_convolutions_give_the_same_bits(rows: int, side: int, memory_format: torch.memory_format) -> None:
    conv = nn.Conv2d(64, 96, 3, padding=1).to(memory_format=memory_format)
    x, store = torch.randn(rows, 64, side, side).to(memory_format=memory_format), PreparedWeights()

    def both() -> list[Tensor]:
        return [conv3x3(x, conv), upsample_conv(x, (2 * side, 2 * side), conv)]

    plain = both()
    with store.in_use():
        first = both()
        made = len(store._made)
        again = both()
    for expected, one, other in zip(plain, first, again, strict=True):
        assert torch.equal(expected, one)
        assert torch.equal(expected, other)
        assert expected.stride() == one.stride()
    is_plain_conv = rows == 1 or memory_format == torch.contiguous_format
    copies = side == 4 and memory_format == torch.contiguous_format
    assert made == len(store._made) == (1 + copies if side == 4 else 2 - is_plain_conv)


def test_gradients_are_the_same() -> None:
    conv, layer, store = nn.Conv2d(64, 64, 3, padding=1), nn.Linear(256, 256), PreparedWeights()
    conv.to(memory_format=torch.channels_last)
    image, row = torch.randn(2, 64, 8, 8), torch.randn(20, 256)

    def gradients() -> list[Tensor]:
        inputs = [image.clone().requires_grad_(), row.clone().requires_grad_(), *conv.parameters(), *layer.parameters()]
        results = [conv3x3(inputs[0], conv), linear(inputs[1], layer.weight, layer.bias)]
        return list(torch.autograd.grad([result.square().sum() for result in results], inputs))

    plain = gradients()
    with store.in_use():
        assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))
