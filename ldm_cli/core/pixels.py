"""Images as bytes and as the numbers that networks take."""

from __future__ import annotations

import torch
from torch import Tensor


def to_signed(images: Tensor, device: torch.device) -> Tensor:
    """uint8 [B, 3, H, W] → float32 in [−1, 1] on the device."""
    return images.to(device, non_blocking=True).float().div_(127.5).sub_(1.0)


def to_bytes(images: Tensor) -> Tensor:
    """Float [B, 3, H, W] in [−1, 1] → uint8, rounded."""
    return images.float().add(1.0).mul(127.5).round_().clamp_(0, 255).to(torch.uint8)
