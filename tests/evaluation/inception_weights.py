"""Weights for FID's Inception network that are the same everywhere: numbers of an integer hash."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from ldm_cli.core.models.inception import InceptionV3
from ldm_cli.formats.model_folder import without_weights

_MASK = 2**32 - 1


def uniform(name: str, count: int) -> Tensor:
    """float32 [count] in [-1, 1), by name."""
    words = torch.arange(count) + zlib.crc32(name.encode())
    for shift, multiplier in ((16, 0x45D9F3B), (15, 0x2C1B3C6D)):
        words = ((words ^ (words >> shift)) * multiplier) & _MASK
    return ((words ^ (words >> 16)).double() / 2**31 - 1).float()


def inception_weights() -> dict[str, Tensor]:
    """All tensors of the network: signals keep their size from layer to layer."""
    with without_weights():
        shapes = {name: tensor.shape for name, tensor in InceptionV3().state_dict().items()}
    weights = {}
    for name, shape in shapes.items():
        values = uniform(name, shape.numel()).view(shape)
        if name.endswith("conv.weight"):
            values = values * (6 / shape[1:].numel()) ** 0.5
        elif name.endswith(("running_var", "bn.weight")):
            values = 1 + 0.4 * values
        else:
            values = 0.1 * values
        weights[name] = values
    return weights
