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
from ldm_cli.core.models.linear import Linear, linear

_QUICK = 1.702


class CLIPAttention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, num_heads: int, *, is_causal: bool) -> None:
        super().__init__()
        self.num_heads, self.is_causal = num_heads, is_causal
        self.k_proj = Linear(dim, dim)
        self.v_proj = Linear(dim, dim)
        self.q_proj = Linear(dim, dim)
        self.out_proj = Linear(dim, dim)

    def forward(self, x: Tensor, at: Tensor | None = None) -> Tensor:
        """[B, L, D] → [B, L, D]; with `at` [B], of that token of each sequence alone: [B, 1, D]."""
        key, value = self.k_proj(x), self.v_proj(x)
        if at is None:
            hidden = attend(self.q_proj(x), key, value, self.num_heads, is_causal=self.is_causal)
        else:
            before = torch.arange(x.shape[1], device=at.device) <= at[:, None, None, None]
            mask = before if self.is_causal else None
            hidden = attend(self.q_proj(_tokens(x, at)), key, value, self.num_heads, mask=mask)
        projected: Tensor = self.out_proj(hidden)
        return projected


class CLIPMLP(nn.Module):
    """Linear, activation, linear.

    `quick_gelu`, x · sigmoid(1.702 x), is SiLU(1.702 x) / 1.702. Both factors go to the layers' weights, of which there
    are fewer than activations: a seventh of the time of a small model's training step.
    """

    def __init__(self, dim: int, inner_dim: int, activation: Activation) -> None:
        super().__init__()
        self.is_quick = activation == "quick_gelu"
        self.fc1 = Linear(dim, inner_dim)
        self.fc2 = Linear(inner_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] → [B, L, D]."""
        if not self.is_quick:
            projected: Tensor = self.fc2(F.gelu(self.fc1(x)))
            return projected
        hidden = F.silu(linear(x, _QUICK * self.fc1.weight, _QUICK * self.fc1.bias))
        return linear(hidden, self.fc2.weight / _QUICK, self.fc2.bias)


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

    def forward(self, x: Tensor, at: Tensor | None = None) -> Tensor:
        """[B, L, D] → [B, L, D]; with `at` [B], of that token of each sequence alone: [B, 1, D]."""
        attention = self.self_attn(self.layer_norm1(x), at)
        x = attention + (x if at is None else _tokens(x, at))
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

    def forward(self, x: Tensor, *, keep_all: bool = False, at: Tensor | None = None) -> tuple[Tensor, ...]:
        """Run all layers.

        Args:
            x: [B, L, D].
            keep_all: return what every layer takes, too.
            at: [B], the one token of each sequence that is wanted. In the last layer the others then serve as keys and
                values only, which saves five sixths of its products.

        Returns:
            The output, [B, L, D] or with `at` [B, 1, D]; before it, if `keep_all`, the input of each layer, [B, L, D].
        """
        states = [x]
        for number, layer in enumerate(self.layers, start=1):
            output: Tensor = self.run(layer, states[-1], at if number == len(self.layers) else None)
            states = [*states, output] if keep_all else [output]
        return tuple(states)


def _tokens(x: Tensor, at: Tensor) -> Tensor:
    """Token `at` [B] of each sequence of x [B, L, D]: [B, 1, D]."""
    return x[torch.arange(len(x), device=x.device), at, None]


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
