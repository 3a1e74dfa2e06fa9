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

_Size = int | tuple[int, int]
_Step = list[tuple[str, int, _Size]]
"""Convolutions of one input, by name, output channels and kernel size; their outputs are concatenated."""


class _Convolution(nn.Module):
    """Convolution, normalisation with fixed statistics, ReLU; `padded` keeps the size at a stride of 1."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: _Size, stride: int = 1, padded: bool = True
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

    Args:
        in_channels: C.
        branches: the steps of each branch.
        pool: the pool of the last branch.
        pool_channels: outputs of the convolution behind the pool; None: no convolution, and all branches halve the
            size with a stride of 2 in their last step.
    """

    def __init__(
        self,
        in_channels: int,
        branches: list[list[_Step]],
        pool: Literal["average", "maximum"] = "average",
        pool_channels: int | None = None,
    ) -> None:
        super().__init__()
        self._pool, self._halves = pool, pool_channels is None
        self._branches = [[[name for name, _, _ in step] for step in branch] for branch in branches]
        for branch in branches:
            channels = in_channels
            for step in branch:
                last = self._halves and step is branch[-1]
                for name, out_channels, kernel in step:
                    layer = _Convolution(channels, out_channels, kernel, stride=2 if last else 1, padded=not last)
                    self.add_module(name, layer)
                channels = sum(out_channels for _, out_channels, _ in step)
        self.branch_pool = None if pool_channels is None else _Convolution(in_channels, pool_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch in self._branches:
            hidden = x
            for names in branch:
                hidden = torch.cat([self.get_submodule(name)(hidden) for name in names], 1)
            outputs.append(hidden)
        return torch.cat([*outputs, self._pooled(x)], 1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.branch_pool is None:
            return F.max_pool2d(x, 3, 2)
        if self._pool == "maximum":
            pooled = F.max_pool2d(x, 3, 1, padding=1)
        else:
            pooled = F.avg_pool2d(x, 3, 1, padding=1, count_include_pad=False)
        result: Tensor = self.branch_pool(pooled)
        return result


def _mixed_5(in_channels: int, pool_channels: int) -> _Mixed:
    dense: list[_Step] = [[("branch3x3dbl_1", 64, 1)], [("branch3x3dbl_2", 96, 3)], [("branch3x3dbl_3", 96, 3)]]
    wide: list[_Step] = [[("branch5x5_1", 48, 1)], [("branch5x5_2", 64, 5)]]
    return _Mixed(in_channels, [[[("branch1x1", 64, 1)]], wide, dense], pool_channels=pool_channels)


def _mixed_6a() -> _Mixed:
    dense: list[_Step] = [[("branch3x3dbl_1", 64, 1)], [("branch3x3dbl_2", 96, 3)], [("branch3x3dbl_3", 96, 3)]]
    return _Mixed(288, [[[("branch3x3", 384, 3)]], dense])


def _mixed_6(middle: int) -> _Mixed:
    row, column = (1, 7), (7, 1)
    single: list[_Step] = [
        [("branch7x7_1", middle, 1)],
        [("branch7x7_2", middle, row)],
        [("branch7x7_3", 192, column)],
    ]
    double: list[_Step] = [
        [("branch7x7dbl_1", middle, 1)],
        [("branch7x7dbl_2", middle, column)],
        [("branch7x7dbl_3", middle, row)],
        [("branch7x7dbl_4", middle, column)],
        [("branch7x7dbl_5", 192, row)],
    ]
    return _Mixed(768, [[[("branch1x1", 192, 1)]], single, double], pool_channels=192)


def _mixed_7a() -> _Mixed:
    single: list[_Step] = [[("branch3x3_1", 192, 1)], [("branch3x3_2", 320, 3)]]
    long: list[_Step] = [
        [("branch7x7x3_1", 192, 1)],
        [("branch7x7x3_2", 192, (1, 7))],
        [("branch7x7x3_3", 192, (7, 1))],
        [("branch7x7x3_4", 192, 3)],
    ]
    return _Mixed(768, [single, long])


def _mixed_7(in_channels: int, pool: Literal["average", "maximum"]) -> _Mixed:
    def fork(name: str) -> _Step:
        return [(f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1))]

    single: list[_Step] = [[("branch3x3_1", 384, 1)], fork("branch3x3_2")]
    double: list[_Step] = [[("branch3x3dbl_1", 448, 1)], [("branch3x3dbl_2", 384, 3)], fork("branch3x3dbl_3")]
    return _Mixed(in_channels, [[[("branch1x1", 320, 1)]], single, double], pool, 192)


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
        self.Mixed_6a, self.Mixed_6b, self.Mixed_6c = _mixed_6a(), _mixed_6(128), _mixed_6(160)
        self.Mixed_6d, self.Mixed_6e = _mixed_6(160), _mixed_6(192)
        self.Mixed_7a, self.Mixed_7b, self.Mixed_7c = _mixed_7a(), _mixed_7(1280, "average"), _mixed_7(2048, "maximum")
        self.fc = nn.Linear(2048, 1008)
        self.eval()

    def forward(self, pixels: Tensor, taps: Iterable[Tap] = ("2048",)) -> dict[Tap, Tensor]:
        """Features of pictures; layers behind the last one of `taps` are not computed.

        Args:
            pixels: [B, 3, 299, 299], about [-1, 1].
            taps: which features.

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
