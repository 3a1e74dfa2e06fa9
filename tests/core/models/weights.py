"""Test weights and golden key lists."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Weights with unit gain, norms near one, biases near zero: all parameters matter, nothing explodes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(1 + 0.1 * noise)


def golden_shapes(name: str) -> dict[str, list[int]]:
    """Parameter name → shape, as a published library wrote them."""
    lines = (Path(__file__).parent / "golden" / f"{name}.txt").read_text().splitlines()
    pairs = (line.split(" ", 1) for line in lines)
    return {key: [int(n) for n in shape.strip("[]").split(",") if n.strip()] for key, shape in pairs}


def shapes(module: nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def gradients(module: nn.Module, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradient of the mean square of the first output with respect to every parameter."""
    module.zero_grad()
    output = module(*inputs)
    output.square().mean().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
