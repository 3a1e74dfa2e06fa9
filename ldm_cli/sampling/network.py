"""What stands between a sampler and the denoiser: known regions and windows; the same for every sampler."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ldm_cli.core.condition import Condition
from ldm_cli.core.diffusion.guidance import ConditionalNetwork
from ldm_cli.core.diffusion.process import Level
from ldm_cli.core.diffusion.samplers import CleanPredictor
from ldm_cli.sampling.tiling import tiled


def keep_known_region(denoise: CleanPredictor, known: Tensor, mask: Tensor, noise: Tensor) -> CleanPredictor:
    """The predictor of x_0, given the known picture at the noise level of each call wherever the mask is 0.

    This is inpainting with any model (Lugmayr et al. 2022, eq. 8, arXiv:2201.09865). Samplers are pointwise, so that it
    does not matter whether they or their denoiser put the known region in its place.

    Args:
        denoise: x and its level → x_0.
        known: latents of the picture, [1, C, h, w].
        mask: [1, 1, h, w], above 0 where the picture changes.
        noise: [B, C, h, w], one for all levels; that of the start.
    """
    first: Level | None = None

    def masked(x: Tensor, level: Level) -> Tensor:
        nonlocal first
        first = level if first is None else first
        # At the first level x is the noise itself, or noised latents: known already.
        if level != first:
            x = torch.where(mask > 0, x, level.signal * known + level.noise * noise)
        return torch.where(mask > 0, denoise(x, level), known)

    return masked


def in_windows(network: ConditionalNetwork, window: int) -> ConditionalNetwork:
    """The network on windows of `window` × `window` latents that overlap by half, blended."""

    def windowed(x: Tensor, level: Level, condition: Condition) -> Tensor:
        channels = x.shape[1]

        def on_window(part: Tensor) -> Tensor:
            cropped = None if condition.concat is None else part[:, channels:]
            return network(part[:, :channels], level, replace(condition, concat=cropped))

        whole = x if condition.concat is None else torch.cat([x, condition.concat], dim=1)
        return tiled(on_window, whole, window, window // 2)

    return windowed
