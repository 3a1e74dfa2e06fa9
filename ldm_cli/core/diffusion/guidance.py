"""Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm_cli.core.diffusion.samplers import Denoiser

Network = Callable[[Tensor, float, Tensor], Tensor]
"""(x_t [B, …], t, context [B, L, D]) → what the network predicts, [B, …]."""


def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """unconditional + scale · (conditional − unconditional), of their shape."""
    return unconditional + scale * (conditional - unconditional)


def guided(network: Network, conditional: Tensor, unconditional: Tensor, scale: float) -> Denoiser:
    """The network with its context fixed, pushed from `unconditional` towards `conditional`.

    Both halves go through the network as one batch; at scale 1 only the conditional half is computed.

    Args:
        network: takes a context.
        conditional, unconditional: contexts [B, L, D]; a negative prompt takes the place of the empty one.
        scale: 1 is the conditional network, more exaggerates the difference.
    """
    if scale == 1.0:
        return lambda x, t: network(x, t, conditional)
    context = torch.cat([unconditional, conditional])

    def denoise(x: Tensor, t: float) -> Tensor:
        half_without, half_with = network(torch.cat([x, x]), t, context).chunk(2)
        return guide(half_without, half_with, scale)

    return denoise
