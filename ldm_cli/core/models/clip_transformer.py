"""The pre-norm Transformer of both CLIP towers. Parameter names are those of transformers' CLIPModel.

Letters: B batch, L tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_cli.core.compiling import Region
from ldm_cli.core.models.attention import attend
from ldm_cli.core.models.checkpointing import Checkpointed
from ldm_cli.core.models.clip_config import Activation


def quick_gelu(x: Tensor) -> Tensor:
    """x · sigmoid(1.702 x): the approximation of GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415) that CLIP uses."""
    return x * torch.sigmoid(1.702 * x)


class CLIPAttention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, num_heads: int, *, is_causal: bool) -> None:
        super().__init__()
        self.num_heads, self.is_causal = num_heads, is_causal
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.q_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, L, D], and a mask for `attend` → [B, L, D]."""
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        attended = attend(query, key, value, self.num_heads, is_causal=self.is_causal, mask=mask)
        projected: Tensor = self.out_proj(attended)
        return projected


class CLIPMLP(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, dim: int, inner_dim: int, activation: Activation) -> None:
        super().__init__()
        self.activation = quick_gelu if activation == "quick_gelu" else F.gelu
        self.fc1 = nn.Linear(dim, inner_dim)
        self.fc2 = nn.Linear(inner_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] → [B, L, D]."""
        projected: Tensor = self.fc2(self.activation(self.fc1(x)))
        return projected


class CLIPEncoderLayer(Region):
    """Self-attention and feed-forward, each after a layer norm and added to its input."""

    def __init__(
        self, dim: int, num_heads: int, inner_dim: int, activation: Activation, eps: float, *, is_causal: bool
    ) -> None:
        super().__init__()
        self.self_attn = CLIPAttention(dim, num_heads, is_causal=is_causal)
        self.layer_norm1 = nn.LayerNorm(dim, eps=eps)
        self.mlp = CLIPMLP(dim, inner_dim, activation)
        self.layer_norm2 = nn.LayerNorm(dim, eps=eps)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, L, D], and a mask for `attend` → [B, L, D]."""
        x = x + self.self_attn(self.layer_norm1(x), mask)
        hidden: Tensor = x + self.mlp(self.layer_norm2(x))
        return hidden


class CLIPEncoder(Checkpointed):
    """A stack of layers, initialised as OpenAI's CLIP does its text tower (Radford et al. 2021, section 2.4).

    Normal weights, zero biases; deviations: D^-½ for query, key and value, (2D)^-½ for the first feed-forward
    layer, D^-½ · (2·layers)^-½ for what adds to the residual stream, so that its variance is kept in depth.
    """

    def __init__(
        self,
        num_layers: int,
        dim: int,
        num_heads: int,
        inner_dim: int,
        activation: Activation,
        eps: float,
        *,
        is_causal: bool,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            CLIPEncoderLayer(dim, num_heads, inner_dim, activation, eps, is_causal=is_causal) for _ in range(num_layers)
        )
        for layer in self.layers:
            assert isinstance(layer, CLIPEncoderLayer)
            _initialise(layer, dim, num_layers)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, keep_all: bool = False) -> tuple[Tensor, ...]:
        """Run all layers.

        Args:
            x: [B, L, D].
            mask: for `attend`.
            keep_all: also return the input of each layer.

        Returns:
            The output [B, L, D]; before it, if `keep_all`, the input of each layer, [B, L, D].
        """
        states = [x]
        for layer in self.layers:
            output: Tensor = self.run(layer, states[-1], mask)
            states = [*states, output] if keep_all else [output]
        return tuple(states)


def _initialise(layer: CLIPEncoderLayer, dim: int, num_layers: int) -> None:
    attention, mlp = layer.self_attn, layer.mlp
    residual_std = dim**-0.5 * (2 * num_layers) ** -0.5
    for layer_of_tokens in (attention.q_proj, attention.k_proj, attention.v_proj):
        nn.init.normal_(layer_of_tokens.weight, std=dim**-0.5)
    nn.init.normal_(mlp.fc1.weight, std=(2 * dim) ** -0.5)
    for last in (attention.out_proj, mlp.fc2):
        nn.init.normal_(last.weight, std=residual_std)
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
