"""Similarity of an image to its original: PSNR and SSIM."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SSIM_WINDOW = 11
"""Side of SSIM's window in pixels; images must not be smaller."""

_PEAK = 255.0
_MAX_PSNR = 100.0
_WINDOW_SIGMA = 1.5
_K1, _K2 = 0.01, 0.03


def psnr(images: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, 10·log₁₀(255² / MSE) in dB, over all pixels and channels.

    Args:
        images, originals: [B, C, H, W] in [0, 255], any type.

    Returns:
        float32 [B]. Identical images count as 100 dB in place of infinity, so that means exist.

    Raises:
        ValueError: if the shapes differ.
    """
    _check(images, originals)
    error = (images.double() - originals.double()).square().flatten(1).mean(1)
    return (10 * torch.log10(_PEAK**2 / error)).clamp(max=_MAX_PSNR).float()


def ssim(images: Tensor, originals: Tensor) -> Tensor:
    """Structural similarity of each image, at most 1 (Wang, Bovik, Sheikh, Simoncelli 2004,
    doi:10.1109/TIP.2003.819861, eq. 13).

    As in the paper: an 11×11 Gaussian window with σ = 1.5, K₁ = 0.01, K₂ = 0.03, range 255, only windows inside the
    image, variances not bias-corrected. Channels are compared separately and averaged; images are not scaled down.

    Args:
        images, originals: [B, C, H, W] in [0, 255], any type; H and W at least 11.

    Returns:
        float32 [B].

    Raises:
        ValueError: if the shapes differ or the images are smaller than the window.
    """
    _check(images, originals)
    if min(images.shape[2:]) < SSIM_WINDOW:
        raise ValueError(f"ssim: images are {list(images.shape[2:])}, smaller than the {SSIM_WINDOW}-pixel window")
    x, y = images.double(), originals.double()
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    var_x = _window_mean(x * x) - mean_x**2
    var_y = _window_mean(y * y) - mean_y**2
    covariance = _window_mean(x * y) - mean_x * mean_y
    c1, c2 = (_K1 * _PEAK) ** 2, (_K2 * _PEAK) ** 2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    return similarity.flatten(1).mean(1).float()


def _window_mean(x: Tensor) -> Tensor:
    """Gaussian-weighted means over all windows inside [B, C, H, W]: [B, C, H - 10, W - 10]."""
    axis = torch.arange(SSIM_WINDOW, dtype=x.dtype, device=x.device) - SSIM_WINDOW // 2
    weights = torch.exp(-axis.square() / (2 * _WINDOW_SIGMA**2))
    weights = weights / weights.sum()
    planes = x.reshape(-1, 1, *x.shape[2:])
    planes = F.conv2d(F.conv2d(planes, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    return planes.reshape(*x.shape[:2], *planes.shape[2:])


def _check(images: Tensor, originals: Tensor) -> None:
    if images.shape != originals.shape or images.ndim != 4:
        raise ValueError(f"images are {list(images.shape)}, originals {list(originals.shape)}, not both [B, C, H, W]")
