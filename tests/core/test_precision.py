"""Types by name, and autocast."""

from __future__ import annotations

import pytest
import torch

from ldm_cli.core.precision import DTYPES, autocast, precision_on


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_products_under_autocast_have_the_named_type_and_weights_stay_float32(precision: str) -> None:
    layer, x = torch.nn.Linear(4, 3), torch.ones(2, 4)
    with autocast(torch.device("cpu"), precision):
        y = layer(x)
    assert y.dtype == DTYPES[precision]
    assert layer.weight.dtype == torch.float32


def test_fp32_switches_nothing_on_and_warns_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    with autocast("cpu", "fp32"):
        assert not torch.is_autocast_enabled("cpu")
    assert not recwarn.list


def test_a_cached_cast_is_of_the_weights_as_they_were_and_can_be_switched_off() -> None:
    layer, x = torch.nn.Linear(1, 1, bias=False), torch.ones(1, 1)
    results = []
    for cache_enabled in (True, False):
        layer.weight.data.fill_(1.0)
        with autocast("cpu", "bf16", cache_enabled=cache_enabled):
            layer(x)
            layer.weight.data.fill_(2.0)
            results.append(layer(x).item())
    assert results == [1.0, 2.0]


def test_the_default_is_bf16_on_cuda_and_fp32_elsewhere() -> None:
    assert [precision_on(device, None) for device in ("cuda:1", "cpu")] == ["bf16", "fp32"]
    assert precision_on("cuda", "fp32") == "fp32"


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(KeyError, match="fp8"):
        autocast("cpu", "fp8")
