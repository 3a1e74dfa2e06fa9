"""The Inception-v3 of the Fréchet Inception Distance: TensorFlow's network of 2015-12-05.

Source: Szegedy et al. 2015, arXiv:1512.00567, with 1008 classes and no auxiliary classifier. It differs from
torchvision's network: average pools leave out the padding, and the last block has a maximum pool. Parameter names are
those of the published `pt_inception-2015-12-05-6726825d.pth`.

Letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INCEPTION_SIDE = 299
"""Height and width of the network's input in pixels."""

Tap = Literal["64", "192", "768", "2048", "logits"]
"""A place where features are taken, by their number; the spatial mean of `64`, `192` and `768` is taken. `logits` are
2048 features times the last layer's weights, without its bias, as the Inception score takes them."""

NUM_FEATURES: dict[Tap, int] = {"64": 64, "192": 192, "768": 768, "2048": 2048, "logits": 1008}
"""Features of each tap."""

_Kernel = int | tuple[int, int]
_Branches = dict[str, list[tuple[int, *tuple[_Kernel, ...]]]]
"""The steps of each branch: output channels and one or two kernels. Outputs of two are concatenated."""

_ROW, _COLUMN = (1, 7), (7, 1)
_FORK = ((1, 3), (3, 1))


class _Convolution(nn.Module):
    """Convolution, normalisation with fixed statistics, ReLU; `padded` keeps the size at a stride of 1."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: _Kernel, *, stride: int = 1, padded: bool = True
    ) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if padded else (0, 0)
        self.conv = nn.Conv2d(in_channels, out_channels, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)
        self.bn.num_batches_tracked = None  # some of the published files lack it

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Mixed(nn.Module):
    """Branches of convolutions beside a pooled one, concatenated along the channels.

    The convolutions are called after their branch: `branch5x5_2` is the second of several, `branch3x3_2a` has the first
    kernel of two.

    Args:
        in_channels: C.
        branches: all but the pooled one.
        pool_channels: outputs of the convolution behind the pool; None: no convolution, and all branches halve the
            size with a stride of 2 in their last step.
        maximum: the pool takes maxima instead of means.
    """

    def __init__(
        self, in_channels: int, branches: _Branches, pool_channels: int | None = None, maximum: bool = False
    ) -> None:
        super().__init__()
        self._names, self._maximum = list[list[list[str]]](), maximum
        for branch, steps in branches.items():
            channels, found = in_channels, list[list[str]]()
            for number, (width, *kernels) in enumerate(steps, start=1):
                name = branch if len(steps) == 1 else f"{branch}_{number}"
                names = [name] if len(kernels) == 1 else [f"{name}a", f"{name}b"]
                halves = pool_channels is None and number == len(steps)
                for own, kernel in zip(names, kernels, strict=True):
                    layer = _Convolution(channels, width, kernel, stride=2 if halves else 1, padded=not halves)
                    self.add_module(own, layer)
                channels = width * len(kernels)
                found.append(names)
            self._names.append(found)
        self.branch_pool = None if pool_channels is None else _Convolution(in_channels, pool_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for steps in self._names:
            hidden = x
            for names in steps:
                hidden = torch.cat([self.get_submodule(name)(hidden) for name in names], 1)
            outputs.append(hidden)
        if self.branch_pool is None:
            outputs.append(F.max_pool2d(x, 3, 2))
        elif self._maximum:
            outputs.append(self.branch_pool(F.max_pool2d(x, 3, 1, padding=1)))
        else:
            outputs.append(self.branch_pool(F.avg_pool2d(x, 3, 1, padding=1, count_include_pad=False)))
        return torch.cat(outputs, 1)


def _mixed_5(in_channels: int, pool_channels: int) -> _Mixed:
    branches: _Branches = {
        "branch1x1": [(64, 1)],
        "branch5x5": [(48, 1), (64, 5)],
        "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
    }
    return _Mixed(in_channels, branches, pool_channels)


def _mixed_6(middle: int) -> _Mixed:
    branches: _Branches = {
        "branch1x1": [(192, 1)],
        "branch7x7": [(middle, 1), (middle, _ROW), (192, _COLUMN)],
        "branch7x7dbl": [(middle, 1), (middle, _COLUMN), (middle, _ROW), (middle, _COLUMN), (192, _ROW)],
    }
    return _Mixed(768, branches, 192)


def _mixed_7(in_channels: int, maximum: bool) -> _Mixed:
    branches: _Branches = {
        "branch1x1": [(320, 1)],
        "branch3x3": [(384, 1), (384, *_FORK)],
        "branch3x3dbl": [(448, 1), (384, 3), (384, *_FORK)],
    }
    return _Mixed(in_channels, branches, 192, maximum)


class InceptionV3(nn.Module):
    """The network; always in evaluation mode, as its statistics are fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Convolution(3, 32, 3, stride=2, padded=False)
        self.Conv2d_2a_3x3 = _Convolution(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = _Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = _Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = _Convolution(80, 192, 3, padded=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _mixed_5(192, 32), _mixed_5(256, 64), _mixed_5(288, 64)
        self.Mixed_6a = _Mixed(288, {"branch3x3": [(384, 3)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]})
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = map(_mixed_6, (128, 160, 160, 192))
        long: _Branches = {"branch7x7x3": [(192, 1), (192, _ROW), (192, _COLUMN), (192, 3)]}
        self.Mixed_7a = _Mixed(768, {"branch3x3": [(192, 1), (320, 3)], **long})
        self.Mixed_7b, self.Mixed_7c = _mixed_7(1280, maximum=False), _mixed_7(2048, maximum=True)
        self.fc = nn.Linear(2048, 1008)
        self.eval()

    def forward(self, pixels: Tensor, taps: Iterable[Tap] = ("2048",)) -> dict[Tap, Tensor]:
        """Features of pictures; layers behind the last one of `taps` are not computed.

        Args:
            pixels: [B, 3, 299, 299], about [-1, 1].

        Returns:
            For each of `taps` [B, N], N as in `NUM_FEATURES`.
        """
        found, wanted = dict[Tap, Tensor](), set(taps)
        for tap, features in self._features(pixels):
            if tap in wanted:
                found[tap] = features if features.ndim == 2 else features.mean((2, 3))
            if wanted <= found.keys():
                break
        return found

    def _features(self, x: Tensor) -> Iterator[tuple[Tap, Tensor]]:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, 2)
        yield "64", x
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        yield "192", x
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        yield "768", x
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))
        yield "2048", x
        yield "logits", F.linear(x, self.fc.weight)
