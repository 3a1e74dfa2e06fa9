"""LPIPS of published weights."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from ldm_cli.core.models.lpips import SMALLEST_SIDE, LPIPSBackbone
from ldm_cli.errors import CheckpointError
from ldm_cli.evaluation.perceptual_distance import PerceptualDistance
from tests.evaluation.lpips_weights import lpips_weights

CPU = torch.device("cpu")
BACKBONES: tuple[LPIPSBackbone, ...] = get_args(LPIPSBackbone)
STEPS: dict[LPIPSBackbone, list[str]] = {
    "alex": ["0/4/2*", "p", "3/1/2*", "p", "6/1/1*", "8/1/1*", "10/1/1*"],
    "vgg": ["0", "2*", "p", "5", "7*", "p", "10", "12", "14*", "p", "17", "19", "21*", "p", "24", "26", "28*"],
}
"""Convolutions as layer/stride/padding, pools, and a star where the distance is taken."""


def distance(file: Path, backbone: LPIPSBackbone) -> PerceptualDistance:
    classifier, heads = lpips_weights(backbone)
    save_file({**classifier, **heads}, file)
    return PerceptualDistance(file, CPU)


def pictures(seed: int, side: int, count: int = 2) -> Tensor:
    return torch.randint(256, (count, 3, side, side), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def by_the_formula(x: Tensor, y: Tensor, backbone: LPIPSBackbone) -> Tensor:
    """Equation 1 in float64, step by step."""
    classifier, heads = lpips_weights(backbone)
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64).view(3, 1, 1)
    a, b = ((images.double() / 127.5 - 1 - shift) / scale for images in (x, y))
    total, number = torch.zeros(len(x), dtype=torch.float64), 0
    for step in STEPS[backbone]:
        if step == "p":
            a, b = (F.max_pool2d(t, 3 if backbone == "alex" else 2, 2) for t in (a, b))
            continue
        layer, stride, padding = [*step.rstrip("*").split("/"), "1", "1"][:3]
        weight, bias = (classifier[f"features.{layer}.{name}"].double() for name in ("weight", "bias"))
        a, b = (F.relu(F.conv2d(t, weight, bias, int(stride), int(padding))) for t in (a, b))
        if step.endswith("*"):
            difference = F.normalize(a, dim=1, eps=0) - F.normalize(b, dim=1, eps=0)
            own = heads[f"lin{number}.model.1.weight"].double().view(1, -1, 1, 1)
            total = total + (own * difference.nan_to_num().square()).sum(1).mean((1, 2))
            number += 1
    assert number == 5
    return total


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_distance_is_that_of_the_formula(backbone: LPIPSBackbone, tmp_path: Path) -> None:
    x, y = pictures(0, 40), pictures(1, 40)
    found = distance(tmp_path / "lpips.safetensors", backbone)(x, y)
    torch.testing.assert_close(found.double(), by_the_formula(x, y, backbone), rtol=1e-4, atol=0)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_it_is_symmetric_and_zero_for_equal_pictures_down_to_the_smallest(
    backbone: LPIPSBackbone, tmp_path: Path
) -> None:
    measure = distance(tmp_path / "lpips.safetensors", backbone)
    x, y = pictures(0, SMALLEST_SIDE[backbone]), pictures(1, SMALLEST_SIDE[backbone])
    assert torch.equal(measure(x, x), torch.zeros(2))
    assert float(measure(x, y).min()) > 0
    torch.testing.assert_close(measure(x, y), measure(y, x))
    with pytest.raises(RuntimeError):
        measure(*(pictures(n, SMALLEST_SIDE[backbone] - 1) for n in (0, 1)))


def test_other_weights_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"weight": torch.zeros(3)}, file)
    with pytest.raises(CheckpointError, match="no weights of LPIPS"):
        PerceptualDistance(file, CPU)
    save_file(lpips_weights("alex")[0], file)
    with pytest.raises(CheckpointError, match=r"lin0\.model\.1\.weight"):
        PerceptualDistance(file, CPU)
