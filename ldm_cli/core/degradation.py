"""What happens to a picture on its way to low resolution: blur, resampling, JPEG; on the device, as tensors.

Letters: B batch, C channels, H W size before, h w size after.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_MIN_SIGMA = 1e-3
# Tables K.1 and K.2 of ITU-T T.81, which libjpeg scales by quality.
_LUMA = (
    *(16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56),
    *(14, 17, 22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92),
    *(49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMA = (
    *(17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99),
    *(47, 66, 99, 99, 99, 99, 99, 99),
    *(99,) * 32,
)


def resampled(images: Tensor, size: tuple[int, int], *, corners: bool) -> Tensor:
    """Images [B, C, H, W] → [B, C, h, w], smaller: bicubic with antialiasing (Keys 1981, a = −1/2), as in Pillow.

    Args:
        images: float.
        size: (h, w).
        corners: the centres of the corner pixels stay where they are, so that bilinear enlargement with `align_corners`
            puts every pixel back in its place; else the edges of the picture do.
    """
    rows, columns = (_resampling(old, new, corners, images) for old, new in zip(images.shape[-2:], size, strict=True))
    return rows @ images @ columns.T


def _resampling(old: int, new: int, corners: bool, like: Tensor) -> Tensor:
    """The weights [new, old] of each pixel before in each pixel after."""
    scale = (old - 1) / max(1, new - 1) if corners else old / new
    index = torch.arange(new, dtype=torch.float32, device=like.device)[:, None]
    centre = index * scale if corners else (index + 0.5) * scale - 0.5
    distance = (torch.arange(old, dtype=torch.float32, device=like.device) - centre).abs() / max(1.0, scale)
    near = (1.5 * distance - 2.5) * distance**2 + 1.0
    far = ((-0.5 * distance + 2.5) * distance - 4.0) * distance + 2.0
    weights = torch.where(distance < 1.0, near, torch.where(distance < 2.0, far, torch.zeros_like(far)))
    return (weights / weights.sum(dim=1, keepdim=True)).to(like.dtype)


def blurred(images: Tensor, sigma: Tensor) -> Tensor:
    """Images [B, C, H, W] under Gaussians of deviation σ [B], in pixels; at the edges the weights inside count."""
    rows, columns = (_gaussian(length, sigma.float()) for length in images.shape[-2:])
    return rows @ images @ columns.transpose(-1, -2)


def _gaussian(length: int, sigma: Tensor) -> Tensor:
    """[B, 1, length, length], rows of sum 1."""
    index = torch.arange(length, dtype=torch.float32, device=sigma.device)
    spread = sigma.clamp(min=_MIN_SIGMA)[:, None, None]
    weights = torch.exp(-0.5 * ((index[:, None] - index) / spread) ** 2)
    return (weights / weights.sum(dim=-1, keepdim=True))[:, None]


def jpeg(images: Tensor, quality: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [−1, 1] as JPEG keeps them, with colours at half size (ITU-T T.81; JFIF 1.02).

    Args:
        images: float.
        quality: [B], 1 … 100, as libjpeg scales the tables.
    """
    height, width = images.shape[-2:]
    padded = F.pad((images.clamp(-1.0, 1.0) + 1.0) * 127.5, (0, -width % 16, 0, -height % 16), mode="replicate")
    red, green, blue = padded.round().unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    chroma = torch.stack([(blue - luma) / 1.772, (red - luma) / 1.402], dim=1).round()
    scale = torch.where(quality < 50, 5000.0 / quality, 200.0 - 2.0 * quality).floor()
    luma = _through_blocks(luma.round()[:, None] - 128.0, _table(_LUMA, scale)) + 128.0
    chroma = _through_blocks(F.avg_pool2d(chroma, 2).round(), _table(_CHROMA, scale))
    chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False)
    blue, red = chroma[:, :1], chroma[:, 1:]
    colors = [luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue]
    result = torch.cat(colors, dim=1).round().clamp(0.0, 255.0) / 127.5 - 1.0
    return result[..., :height, :width]


def _table(base: tuple[int, ...], scale: Tensor) -> Tensor:
    """The quantization steps [B, 8, 8] of a quality's scale in percent [B]."""
    frequency = torch.arange(64, device=scale.device)
    table = torch.zeros(64, device=scale.device)
    for i, value in enumerate(base):
        table = torch.where(frequency == i, float(value), table)
    return ((table * scale[:, None] + 50.0) / 100.0).floor().clamp(1.0, 255.0).view(-1, 8, 8)


def _through_blocks(planes: Tensor, table: Tensor) -> Tensor:
    """Planes [B, C, H, W], sides multiples of 8, with the cosine transform of each 8×8 block quantized."""
    index = torch.arange(8, dtype=torch.float32, device=planes.device)
    cosine = 0.5 * torch.cos((2.0 * index + 1.0) * index[:, None] * (math.pi / 16.0))
    cosine = torch.where(index[:, None] == 0, cosine / math.sqrt(2.0), cosine)
    rows, columns = planes.shape[2] // 8, planes.shape[3] // 8
    blocks = planes.reshape(*planes.shape[:2], rows, 8, columns, 8).transpose(3, 4)
    steps = table[:, None, None, None]
    kept = cosine.T @ (((cosine @ blocks @ cosine.T) / steps).round() * steps) @ cosine
    return kept.transpose(3, 4).reshape(planes.shape)
