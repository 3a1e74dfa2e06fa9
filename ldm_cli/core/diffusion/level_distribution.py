"""Which noise levels training visits: distributions of u, the share of levels with less noise, in (0, 1].

    uniform         π(u) = 1
    logit_normal    π(u) = exp(−(logit u − m)² / 2s²) / (s √(2π) u (1 − u))            Esser et al. 2024, eq. 19
    mode            u = w + s (w − sin²(π w / 2)) of uniform w                         eq. 20, with w for 1 − u
    cosmap          π(u) = 2 / (π − 2π u + 2π u²), the levels of a cosine schedule     eq. 21

(arXiv:2403.03206, section 3.1). To visit u with density π is to weigh the loss of uniform levels by π(u).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm_cli import philox
from ldm_cli.core.diffusion.config import DiffusionConfig


def random_levels(config: DiffusionConfig, key: philox.Key, epoch: Tensor, position: Tensor) -> Tensor:
    """u of `Process.at` for each sample, computed on the device of the counters.

    Args:
        epoch, position: of the samples, int64 [B].

    Returns:
        float32 [B] in (0, 1].
    """
    if config.timestep_sampling == "logit_normal":
        normal = philox.normal(key, epoch, position, (1,))[:, 0]
        return torch.sigmoid(config.logit_mean + config.logit_std * normal)
    w = philox.uniform(key, epoch, position, 1)[:, 0]
    if config.timestep_sampling == "mode":
        return w + config.mode_scale * (w - torch.sin(math.pi / 2 * w) ** 2)
    if config.timestep_sampling == "cosmap":
        sine, cosine = torch.sin(math.pi / 2 * w), torch.cos(math.pi / 2 * w)
        return sine / (sine + cosine)
    return w
