"""Attention and Transformer blocks of the U-Net and the autoencoder. Parameter names are those of diffusers.

Letters: B batch, L tokens, M context tokens, D width, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_cli.core.compiling import Region
from ldm_cli.core.models.checkpointing import Checkpointed


def tokens_of(x: Tensor) -> Tensor:
    """[B, C, H, W] → [B, H·W, C], row by row; a view."""
    return x.flatten(2).transpose(1, 2)


def image_of(tokens: Tensor, height: int, width: int) -> Tensor:
    """[B, H·W, C] → [B, C, H, W]; a view, in channels-last order for contiguous tokens."""
    batch, _, channels = tokens.shape
    return tokens.transpose(1, 2).view(batch, channels, height, width)


def attend(
    query: Tensor, key: Tensor, value: Tensor, num_heads: int, *, is_causal: bool = False, mask: Tensor | None = None
) -> Tensor:
    """softmax(Q Kᵀ / √d) V per head (Vaswani et al. 2017, eq. 1).

    Args:
        query: [B, L, D]; `num_heads` divides D.
        key, value: [B, M, D].
        is_causal: token i sees tokens 0..i only.
        mask: bool, True where a token sees another, or numbers to add to the logits Q Kᵀ / √d; of a shape that
            broadcasts to [B, heads, L, M]. It takes the place of `is_causal`; None: all see all.

    Returns:
        [B, L, D].
    """
    q, k, v = (x.view(*x.shape[:2], num_heads, -1).transpose(1, 2) for x in (query, key, value))
    is_causal = is_causal and mask is None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Multi-head attention to a context, or to itself.

    Args:
        dim: D of the queries and of the result.
        context_dim: width of the context; None for self-attention.
        num_heads: divides `dim`.
        bias: of the query, key and value projections; the output projection always has one.
    """

    def __init__(self, dim: int, context_dim: int | None, num_heads: int, *, bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=bias)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """[B, L, D] and [B, M, context_dim] → [B, L, D]."""
        context = x if context is None else context
        attended = attend(self.to_q(x), self.to_k(context), self.to_v(context), self.num_heads)
        projected: Tensor = self.to_out[0](attended)
        return projected


class GEGLU(nn.Module):
    """value · gelu(gate), both linear in the input (Shazeer 2020, arXiv:2002.05202, eq. 6)."""

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] → [B, L, inner_dim]."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        gated: Tensor = value * F.gelu(gate)
        return gated


class GELU(nn.Module):
    """gelu of a linear layer, exact or, with `approximate="tanh"`, by its tanh form."""

    def __init__(self, dim: int, inner_dim: int, approximate: str = "none") -> None:
        super().__init__()
        self.proj, self.approximate = nn.Linear(dim, inner_dim), approximate

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] → [B, L, inner_dim]."""
        return F.gelu(self.proj(x), approximate=self.approximate)


class FeedForward(nn.Module):
    """An activation of four times the width, then a linear layer."""

    def __init__(self, dim: int, activation: Callable[[int, int], nn.Module] = GEGLU) -> None:
        super().__init__()
        # The names in the files are net.0.proj and net.2: between them diffusers has a dropout.
        self.net = nn.Sequential(activation(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] → [B, L, D]."""
        hidden: Tensor = self.net(x)
        return hidden


class BasicTransformerBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward: each after a layer norm and added to its input.

    Args:
        dim: D.
        context_dim: width of the text states.
        num_heads: divides D.
        to_text_alone: whether attention to the text takes the place of self-attention.
    """

    def __init__(self, dim: int, context_dim: int, num_heads: int, *, to_text_alone: bool = False) -> None:
        super().__init__()
        self.to_text_alone = to_text_alone
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, context_dim if to_text_alone else None, num_heads, bias=False)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, context_dim, num_heads, bias=False)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """[B, L, D] and [B, M, context_dim] → [B, L, D]."""
        # A sum takes the memory order of its first term. The tokens of an NCHW image are strided, those after
        # a linear layer are not, so in this order the strides vanish without a copy of their own.
        x = self.attn1(self.norm1(x), context if self.to_text_alone else None) + x
        x = self.attn2(self.norm2(x), context) + x
        hidden: Tensor = self.ff(self.norm3(x)) + x
        return hidden


class Transformer2DModel(Region, Checkpointed):
    """Transformer blocks over the pixels of a feature map, added to it (Rombach et al. 2022, E.2.1).

    Args:
        channels: C.
        context_dim: width of the text states.
        num_heads: divides C.
        num_layers: Transformer blocks.
        groups: of the group norm.
        linear: project with linear layers instead of 1×1 convolutions.
        to_text_alone: see `BasicTransformerBlock`.
    """

    def __init__(
        self,
        channels: int,
        context_dim: int,
        num_heads: int,
        num_layers: int,
        *,
        groups: int,
        linear: bool,
        to_text_alone: bool = False,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, context_dim, num_heads, to_text_alone=to_text_alone)
            for _ in range(num_layers)
        )
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """[B, C, H, W] and [B, M, context_dim] → [B, C, H, W]."""
        size = x.shape[-2:]
        hidden = self.norm(x)
        tokens = self.proj_in(tokens_of(hidden)) if self.linear else tokens_of(self.proj_in(hidden))
        for block in self.transformer_blocks:
            tokens = self.run(block, tokens, context)
        if self.linear:
            return x + image_of(self.proj_out(tokens), *size)
        projected: Tensor = self.proj_out(image_of(tokens, *size))
        return x + projected


class AttentionBlock2D(Region, Attention):
    """Self-attention over the pixels of a feature map, added to it: that of autoencoders and of U-Nets without text."""

    def __init__(self, channels: int, num_heads: int = 1, *, groups: int, eps: float) -> None:
        super().__init__(channels, None, num_heads, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=eps)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """[B, C, H, W] → [B, C, H, W]; the context is not looked at."""
        attended = super().forward(tokens_of(self.group_norm(x)))
        return x + image_of(attended, *x.shape[-2:])


class JointAttentionBlock2D(AttentionBlock2D):
    """Attention of the pixels of a feature map to text and pixels at once, added to it, as in GLIDE and IF.

    Nichol et al. 2021, arXiv:2112.10741, section 4.

    Args:
        channels: C.
        context_dim: width of the text states.
        num_heads: divides C.
        groups: of the group norm.
    """

    def __init__(self, channels: int, context_dim: int, num_heads: int, *, groups: int) -> None:
        super().__init__(channels, num_heads, groups=groups, eps=1e-5)
        self.add_k_proj = nn.Linear(context_dim, channels)
        self.add_v_proj = nn.Linear(context_dim, channels)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """[B, C, H, W] and [B, M, context_dim] → [B, C, H, W]."""
        tokens = tokens_of(self.group_norm(x))
        key = torch.cat([self.add_k_proj(context), self.to_k(tokens)], dim=1)
        value = torch.cat([self.add_v_proj(context), self.to_v(tokens)], dim=1)
        attended = self.to_out[0](attend(self.to_q(tokens), key, value, self.num_heads))
        return x + image_of(attended, *x.shape[-2:])


class TextPooling(nn.Module):
    """Text states to a vector that is added to the timestep embedding, by attention of their mean to all of them.

    As in IF, whose names these are.

    Args:
        dim: D of the text states.
        out_dim: E of the result.
        num_heads: divides D.
    """

    def __init__(self, dim: int, out_dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.pool = _AttentionPooling(dim, num_heads)
        self.proj = nn.Linear(dim, out_dim)
        self.norm2 = nn.LayerNorm(out_dim)

    def forward(self, states: Tensor) -> Tensor:
        """[B, M, D] → [B, E]."""
        pooled: Tensor = self.norm2(self.proj(self.pool(self.norm1(states))))
        return pooled


class _AttentionPooling(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(torch.randn(1, dim) / dim**0.5)
        self.k_proj, self.q_proj, self.v_proj = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, states: Tensor) -> Tensor:
        """[B, M, D] → [B, D]."""
        mean = states.mean(dim=1, keepdim=True) + self.positional_embedding
        states = torch.cat([mean, states], dim=1)
        return attend(self.q_proj(mean), self.k_proj(states), self.v_proj(states), self.num_heads)[:, 0]
