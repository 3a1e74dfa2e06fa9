"""CLIP's ResNet image tower, "ModifiedResNet" (Radford et al. 2021, arXiv:2103.00020, section 2.4).

Three differences from the usual ResNet: a stem of three convolutions, average pooling before every stride
(Zhang 2019, arXiv:1904.11486), and attention instead of average pooling at the end. Parameter names are those
of OpenAI's `visual`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ldm_cli.core.compiling import Region
from ldm_cli.core.models.attention import attend, tokens_of
from ldm_cli.core.models.checkpointing import Checkpointed
from ldm_cli.core.models.clip_config import ModifiedResNetConfig
from ldm_cli.core.models.clip_vision import VisionOutput


class Bottleneck(Region):
    """1×1, 3×3, 1×1 convolutions, around which the input is added (He et al. 2016); strides are pools."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = self.expansion * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Sequential | None = None
        if stride > 1 or in_channels != out_channels:
            self.downsample = nn.Sequential()
            self.downsample.add_module("-1", nn.AvgPool2d(stride))
            self.downsample.add_module("0", nn.Conv2d(in_channels, out_channels, 1, bias=False))
            self.downsample.add_module("1", nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, 4·channels, H / stride, W / stride]."""
        hidden = F.relu(self.bn1(self.conv1(x)))
        hidden = F.relu(self.bn2(self.conv2(hidden)))
        hidden = self.bn3(self.conv3(self.avgpool(hidden)))
        return F.relu(hidden + (x if self.downsample is None else self.downsample(x)))


class AttentionPool2d(nn.Module):
    """One query, the mean of the pixels, attends to the mean and to every pixel."""

    def __init__(self, num_pixels: int, dim: int, num_heads: int, output_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(torch.empty(num_pixels + 1, dim))
        self.k_proj = nn.Linear(dim, dim)
        self.q_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.c_proj = nn.Linear(dim, output_dim)
        nn.init.normal_(self.positional_embedding, std=dim**-0.5)
        for linear in (self.k_proj, self.q_proj, self.v_proj, self.c_proj):
            nn.init.normal_(linear.weight, std=dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, H, W] → [B, output_dim]."""
        pixels = tokens_of(x)
        tokens = torch.cat((pixels.mean(dim=1, keepdim=True), pixels), dim=1) + self.positional_embedding
        query = self.q_proj(tokens[:, :1])
        pooled: Tensor = self.c_proj(attend(query, self.k_proj(tokens), self.v_proj(tokens), self.num_heads))
        return pooled[:, 0]


class StatisticsKept:
    """Context in which the batch norms of a module update copies of their running statistics."""

    def __init__(self, module: nn.Module) -> None:
        self.norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
        self.originals: list[dict[str, Tensor]] = []

    def __enter__(self) -> None:
        self.originals = [dict(norm.named_buffers()) for norm in self.norms]
        for norm, buffers in zip(self.norms, self.originals, strict=True):
            for name, buffer in buffers.items():
                setattr(norm, name, buffer.clone())

    def __exit__(self, *_: object) -> None:
        for norm, buffers in zip(self.norms, self.originals, strict=True):
            for name, buffer in buffers.items():
                setattr(norm, name, buffer)


class ModifiedResNet(Checkpointed):
    """The tower and its projection into the joint space.

    Initialised as OpenAI's: D^-½ in the attention pool, and zero gain in the last batch norm of each block,
    so that every block starts as its shortcut (Goyal et al. 2017, arXiv:1706.02677, section 5.1).

    Args:
        output_dim: size of the joint embedding.
    """

    config_class = ModifiedResNetConfig

    def __init__(self, config: ModifiedResNetConfig, output_dim: int) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.conv1 = nn.Conv2d(config.num_channels, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, config.layers[0], stride=1)
        self.layer2 = _stage(4 * width, 2 * width, config.layers[1], stride=2)
        self.layer3 = _stage(8 * width, 4 * width, config.layers[2], stride=2)
        self.layer4 = _stage(16 * width, 8 * width, config.layers[3], stride=2)
        self.attnpool = AttentionPool2d((config.image_size // 32) ** 2, 32 * width, config.heads, output_dim)
        for module in self.modules():
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def forward(self, pixel_values: Tensor, *, output_hidden_states: bool = False) -> VisionOutput:
        """Normalised images [B, 3, H, W] → the *projected* feature [B, output_dim]."""
        size = self.config.image_size
        if pixel_values.shape[-2:] != (size, size):
            raise ValueError(f"image of {tuple(pixel_values.shape[-2:])} px, expected image_size={size}")
        x = F.relu(self.bn1(self.conv1(pixel_values)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        x = F.avg_pool2d(x, 2)
        hidden_states = [x]
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = self.run(block, x)
            hidden_states.append(x)
        return VisionOutput(self.attnpool(x), tuple(hidden_states) if output_hidden_states else ())

    def run(self, layer: nn.Module, *inputs: Any) -> Any:
        """As in the base class; recomputing must not count a batch twice in the running statistics."""
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return layer(*inputs)

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), StatisticsKept(layer)

        return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _stage(in_channels: int, channels: int, num_blocks: int, stride: int) -> nn.Sequential:
    rest = [Bottleneck(Bottleneck.expansion * channels, channels, 1) for _ in range(num_blocks - 1)]
    return nn.Sequential(Bottleneck(in_channels, channels, stride), *rest)
