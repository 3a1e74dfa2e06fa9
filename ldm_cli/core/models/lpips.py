"""LPIPS, version 0.1: the distance of two pictures in the features of a classifier.

Source: Zhang et al. 2018, arXiv:1801.03924, eq. 1. The classifier is AlexNet (Krizhevsky 2014, arXiv:1404.5997) or
VGG-16 (Simonyan & Zisserman 2014, arXiv:1409.1556) with the parameter names of torchvision; the heads have those of the
published files.

Letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

LPIPSBackbone = Literal["alex", "vgg"]

SMALLEST_SIDE: dict[LPIPSBackbone, int] = {"alex": 31, "vgg": 16}
"""Height and width in pixels below which a layer has no output."""

# Behind these layers of torchvision's `features` the distance is taken.
_TAPS: dict[LPIPSBackbone, tuple[int, ...]] = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}
_VGG_BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_EPSILON = 1e-10


class LPIPS(nn.Module):
    """The distance. Its weights are never trained."""

    _shift: Tensor
    _scale: Tensor

    def __init__(self, backbone: LPIPSBackbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.features = nn.Sequential(*(_alexnet() if backbone == "alex" else _vgg16()))
        widths = (64, 192, 384, 256, 256) if backbone == "alex" else [width for width, _ in _VGG_BLOCKS]
        for number, width in enumerate(widths):
            self.add_module(f"lin{number}", _Head(width))
        self.register_buffer("_shift", torch.tensor(_SHIFT).view(3, 1, 1), persistent=False)
        self.register_buffer("_scale", torch.tensor(_SCALE).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1], H and W at least `SMALLEST_SIDE` → distances [B], 0 for equal ones."""
        total = x.new_zeros(len(x))
        for number, (of_x, of_y) in enumerate(zip(self._normalized(x), self._normalized(y), strict=True)):
            total = total + self.get_submodule(f"lin{number}")((of_x - of_y).square()).mean((1, 2, 3))
        return total

    def _normalized(self, pixels: Tensor) -> Iterator[Tensor]:
        """Features of each tap [B, C, H', W'], of length 1 at every place."""
        x = (pixels - self._shift) / self._scale
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in _TAPS[self.backbone]:
                yield x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + _EPSILON)


class _Head(nn.Module):
    """A weight for each channel; the first layer stands for the dropout of training."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        weighted: Tensor = self.model(x)
        return weighted


def _alexnet() -> Iterator[nn.Module]:
    yield from (nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2))
    yield from (nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2))
    for channels, width in ((192, 384), (384, 256), (256, 256)):
        yield from (nn.Conv2d(channels, width, 3, padding=1), nn.ReLU())


def _vgg16() -> Iterator[nn.Module]:
    channels = 3
    for block, (width, depth) in enumerate(_VGG_BLOCKS):
        if block:
            yield nn.MaxPool2d(2)
        for _ in range(depth):
            yield from (nn.Conv2d(channels, width, 3, padding=1), nn.ReLU())
            channels = width
