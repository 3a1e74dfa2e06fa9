"""What stands between a sampler and the U-Net: known regions, extra channels, windows; the same for every sampler."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm_cli.core.diffusion.guidance import ConditionalNetwork
from ldm_cli.core.diffusion.process import Level
from ldm_cli.core.diffusion.samplers import CleanPredictor
from ldm_cli.sampling.edit_input import LatentCanvas
from ldm_cli.sampling.tiling import tiled


def keep_known_region(denoise: CleanPredictor, canvas: LatentCanvas, noise: Tensor) -> CleanPredictor:
    """The denoiser shown the known picture, at the noise level of each call, wherever the mask is 0.

    This is inpainting with any model (Lugmayr et al. 2022, eq. 8, arXiv:2201.09865). Samplers are pointwise, so that it
    does not matter whether they or their denoiser put the known region in its place.

    Args:
        denoise: to be shown.
        canvas: latents and mask.
        noise: [B, C, h, w], one for all levels; that of the start.
    """
    mask, known = canvas.mask, canvas.latents
    assert mask is not None
    first: Level | None = None

    def shown(x: Tensor, level: Level) -> Tensor:
        nonlocal first
        first = level if first is None else first
        # At the first level x is the noise itself, or noised latents: known already.
        if level != first:
            x = torch.where(mask > 0, x, level.signal * known + level.noise * noise)
        return torch.where(mask > 0, denoise(x, level), known)

    return shown


def with_inpainting_channels(network: ConditionalNetwork, canvas: LatentCanvas) -> ConditionalNetwork:
    """A network that also takes the mask and the masked picture, as further channels: [x, mask, masked latents]."""
    mask, masked = canvas.mask, canvas.masked_latents
    assert mask is not None
    assert masked is not None

    def shown(x: Tensor, level: Level, context: Tensor) -> Tensor:
        rows = len(x), -1, -1, -1
        return network(torch.cat([x, mask.to(x).expand(rows), masked.to(x).expand(rows)], dim=1), level, context)

    return shown


def in_windows(network: ConditionalNetwork, window: int) -> ConditionalNetwork:
    """The network on windows of `window` × `window` latents that overlap by half, blended."""

    def shown(x: Tensor, level: Level, context: Tensor) -> Tensor:
        return tiled(lambda part: network(part, level, context), x, window, window // 2)

    return shown
