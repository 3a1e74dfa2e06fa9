"""Gradient checkpointing: recompute activations in the backward pass (Chen et al. 2016, arXiv:1604.06174)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Checkpointed(nn.Module):
    """A module that can run its layers without keeping what happens inside them."""

    gradient_checkpointing: bool = False

    def run(self, layer: nn.Module, *inputs: Any) -> Any:
        """`layer(*inputs)`; with checkpointing only the inputs are kept for the backward pass."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            # No layer of ours draws random numbers, so there is no generator state to keep.
            return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
        return layer(*inputs)


class Checkpointable(nn.Module):
    """A whole model whose `Checkpointed` parts can be switched together."""

    def enable_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute the activations of every layer in the backward pass, or keep them again."""
        for module in self.modules():
            if isinstance(module, Checkpointed):
                module.gradient_checkpointing = enabled
