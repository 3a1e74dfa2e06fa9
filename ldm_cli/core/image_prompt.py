"""Image prompts in a U-Net: attention to the tokens of pictures is added to that to the text, layer by layer.

Hooks of the layers add it, as those of low-rank adapters do: the network and its weights stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ldm_cli.core.models.attention import Attention
from ldm_cli.core.models.ip_adapter import IPAdapter, cross_attentions


class ImagePrompts:
    """What a U-Net attends to beside its text: O = W_o · (A(Q, K, V) + Σ s · A(Q, K_image, V_image)).

    Ye et al. 2023, arXiv:2308.06721, eq. 5, with a sum over several pictures. The U-Net then takes conditions with
    `image_tokens`, those of all pictures side by side; without them it computes what it did before.

    Args:
        unet: a UNet2DConditionModel. Code that is compiled must not have run before.
        prompts: adapter and scale s of each picture; an adapter may serve several.

    Attributes:
        factor: by which all scales are multiplied.
    """

    def __init__(self, unet: nn.Module, prompts: Sequence[tuple[IPAdapter, float]]) -> None:
        self._prompts, self.factor = prompts, 1.0
        self._lengths = [adapter.image_proj.num_tokens for adapter, _ in prompts]
        self._tokens: Tensor | None = None
        unet.register_forward_pre_hook(self._take_tokens)
        for number, layer in cross_attentions(unet).items():
            self._add_to(layer, str(number))

    def _take_tokens(self, unet: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Keep the tokens for the layers. They stay until the next call: recomputed layers need them."""
        x, t, condition = inputs
        self._tokens = condition.image_tokens
        return x, t, replace(condition, image_tokens=None)

    def _add_to(self, layer: Attention, number: str) -> None:
        queries: list[Tensor] = []

        def keep(to_q: nn.Module, inputs: Any, output: Tensor) -> None:
            if self._tokens is not None:
                queries.append(output)

        def add(to_out: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            return (inputs[0] + self._attended(queries.pop(), number, layer.num_heads),) if queries else inputs

        layer.to_q.register_forward_hook(keep)
        layer.to_out[0].register_forward_pre_hook(add)

    def _attended(self, query: Tensor, number: str, num_heads: int) -> Tensor:
        assert self._tokens is not None
        total: Tensor | None = None
        parts = torch.split(self._tokens, self._lengths, dim=1)
        for (adapter, scale), tokens in zip(self._prompts, parts, strict=True):
            part: Tensor = self.factor * scale * adapter.ip_adapter[number](query, tokens, num_heads)
            total = part if total is None else total + part
        assert total is not None
        return total
