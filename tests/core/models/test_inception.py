"""FID's Inception network against a plain re-implementation, and against numbers of pytorch-fid's network."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_cli.core.models.inception import NUM_FEATURES, InceptionV3, Tap
from tests.evaluation.inception_weights import inception_weights

TAPS: tuple[Tap, ...] = ("64", "192", "768", "2048", "logits")
# Sum, absolute maximum and length of the first picture's features in pytorch-fid 0.3.0; the logits are those of
# torch-fidelity 0.4.0.
THEIRS: dict[Tap, tuple[float, float, float]] = {
    "64": (17.17121, 1.028232, 3.039159),
    "192": (67.99385, 2.878303, 7.318828),
    "768": (425.8137, 5.535152, 25.54103),
    "2048": (1732.475, 9.508624, 65.63408),
    "logits": (151.9663, 12.35404, 117.6294),
}


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return inception_weights()


@pytest.fixture(scope="module")
def features(weights: dict[str, Tensor]) -> dict[Tap, Tensor]:
    network = InceptionV3()
    network.load_state_dict(weights, strict=False)
    with torch.inference_mode():
        return network(pixels(), TAPS)


def pixels() -> Tensor:
    """[2, 3, 299, 299] in [-1, 1]: waves of both axes, different in each channel."""
    place = torch.arange(299) / 299
    waves = [torch.sin(math.tau * (c + 1) * place[:, None]) * torch.cos(math.tau * (c + 3) * place) for c in range(6)]
    return torch.stack(waves).view(2, 3, 299, 299)


def convolution(weights: dict[str, Tensor], x: Tensor, name: str, stride: int = 1, padding: str = "same") -> Tensor:
    x = F.conv2d(x, weights[f"{name}.conv.weight"], stride=stride, padding=padding)
    mean, variance = weights[f"{name}.bn.running_mean"], weights[f"{name}.bn.running_var"]
    scale = weights[f"{name}.bn.weight"] / (variance + 1e-3).sqrt()
    return (x * scale[:, None, None] + (weights[f"{name}.bn.bias"] - mean * scale)[:, None, None]).relu()


def average(x: Tensor) -> Tensor:
    """Mean over the part of each 3×3 window that lies inside the picture."""
    ones = F.avg_pool2d(torch.ones_like(x[:1, :1]), 3, 1, 1)
    return F.avg_pool2d(x, 3, 1, 1) / ones


def plain_features(weights: dict[str, Tensor], x: Tensor) -> dict[Tap, Tensor]:
    def chain(x: Tensor, block: str, *names: str) -> Tensor:
        for name in names:
            x = convolution(weights, x, f"{block}.{name}")
        return x

    def fork(x: Tensor, block: str, name: str) -> list[Tensor]:
        return [chain(x, block, f"{name}a"), chain(x, block, f"{name}b")]

    found: dict[Tap, Tensor] = {}
    x = convolution(weights, x, "Conv2d_1a_3x3", stride=2, padding="valid")
    x = convolution(weights, x, "Conv2d_2a_3x3", padding="valid")
    x = F.max_pool2d(convolution(weights, x, "Conv2d_2b_3x3"), 3, 2)
    found["64"] = x.mean((2, 3))
    x = convolution(weights, x, "Conv2d_3b_1x1")
    x = F.max_pool2d(convolution(weights, x, "Conv2d_4a_3x3", padding="valid"), 3, 2)
    found["192"] = x.mean((2, 3))
    for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        wide = chain(x, block, "branch5x5_1", "branch5x5_2")
        dense = chain(x, block, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
        x = torch.cat([chain(x, block, "branch1x1"), wide, dense, chain(average(x), block, "branch_pool")], 1)
    dense = chain(x, "Mixed_6a", "branch3x3dbl_1", "branch3x3dbl_2")
    dense = convolution(weights, dense, "Mixed_6a.branch3x3dbl_3", 2, "valid")
    x = torch.cat([convolution(weights, x, "Mixed_6a.branch3x3", 2, "valid"), dense, F.max_pool2d(x, 3, 2)], 1)
    for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        single = chain(x, block, *(f"branch7x7_{i}" for i in (1, 2, 3)))
        double = chain(x, block, *(f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5)))
        x = torch.cat([chain(x, block, "branch1x1"), single, double, chain(average(x), block, "branch_pool")], 1)
    found["768"] = x.mean((2, 3))
    single = convolution(weights, chain(x, "Mixed_7a", "branch3x3_1"), "Mixed_7a.branch3x3_2", 2, "valid")
    long = chain(x, "Mixed_7a", "branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3")
    long = convolution(weights, long, "Mixed_7a.branch7x7x3_4", 2, "valid")
    x = torch.cat([single, long, F.max_pool2d(x, 3, 2)], 1)
    for block in ("Mixed_7b", "Mixed_7c"):
        pooled = average(x) if block == "Mixed_7b" else F.max_pool2d(x, 3, 1, 1)
        single_fork = fork(chain(x, block, "branch3x3_1"), block, "branch3x3_2")
        double_fork = fork(chain(x, block, "branch3x3dbl_1", "branch3x3dbl_2"), block, "branch3x3dbl_3")
        branches = [chain(x, block, "branch1x1"), *single_fork, *double_fork, chain(pooled, block, "branch_pool")]
        x = torch.cat(branches, 1)
    found["2048"] = x.mean((2, 3))
    found["logits"] = found["2048"] @ weights["fc.weight"].T
    return found


def test_every_feature_is_that_of_a_plain_implementation(
    weights: dict[str, Tensor], features: dict[Tap, Tensor]
) -> None:
    expected = plain_features(weights, pixels())
    for tap in TAPS:
        assert features[tap].shape == (2, NUM_FEATURES[tap])
        torch.testing.assert_close(features[tap], expected[tap], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tap", TAPS)
def test_features_are_those_of_the_published_programs(features: dict[Tap, Tensor], tap: Tap) -> None:
    own = features[tap][0]
    assert (float(own.sum()), float(own.abs().max()), float(own.norm())) == pytest.approx(THEIRS[tap], rel=1e-5)


def test_layers_behind_the_last_feature_are_not_computed(weights: dict[str, Tensor]) -> None:
    network = InceptionV3()
    network.load_state_dict(weights, strict=False)
    network.Mixed_5b = torch.nn.Identity()
    network.Mixed_5c = None  # type: ignore[assignment]
    assert list(network(pixels()[:1], ("192",))) == ["192"]


def test_the_network_stays_in_evaluation_mode() -> None:
    assert not any(module.training for module in InceptionV3().modules())
