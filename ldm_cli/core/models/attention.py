"""Attention and Transformer blocks of the U-Net and the autoencoder. Parameter names are those of diffusers.

Letters: B batch, L tokens, M context tokens, D width, C channels, H height, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_cli.core.compiling import Region
from ldm_cli.core.models.checkpointing import Checkpointed
from ldm_cli.core.models.layers import repeated
from ldm_cli.core.models.linear import Linear, linear
from ldm_cli.core.models.recompute import geglu_linear


def tokens_of(x: Tensor) -> Tensor:
    """[B, C, H, W] → [B, H·W, C], row by row; a view."""
    return x.flatten(2).transpose(1, 2)


def image_of(tokens: Tensor, height: int, width: int) -> Tensor:
    """[B, H·W, C] → [B, C, H, W]; a view, in channels-last order for contiguous tokens."""
    batch, _, channels = tokens.shape
    return tokens.transpose(1, 2).view(batch, channels, height, width)


_LANES = 16
"""float32 numbers of the widest vector of a CPU. torch's attention takes the exponentials of what is left over one by
one: of 77 keys, 13, which takes as long as 64 more."""


def in_lanes(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values [B, M, D] with a few more where these fill the vectors, and the mask that hides them.

    Returns:
        Keys and values [B, M', D], and the mask to be added to scores, [1, 1, 1, M'], or None where M' = M.
    """
    num_keys, spare = key.shape[1], -key.shape[1] % _LANES
    if key.device.type != "cpu" or not 0 < spare < _LANES // 2:
        return key, value, None
    mask = key.new_zeros(1, 1, 1, num_keys + spare)
    mask[..., num_keys:] = -torch.inf
    return F.pad(key, (0, 0, 0, spare)), F.pad(value, (0, 0, 0, spare)), mask


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    *,
    is_causal: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """softmax(Q Kᵀ / √d) V per head (Vaswani et al. 2017, eq. 1).

    Args:
        query: [B, L, D]; `num_heads` divides D.
        key, value: [B, M, D].
        is_causal: token i sees tokens 0..i only.
        mask: expandable to [B, heads, L, M], not together with `is_causal`; bool, True where a query sees a key, or
            to be added to the scores.

    Returns:
        [B, L, D].
    """
    if mask is None:
        key, value, hidden = in_lanes(key, value)
        mask = None if is_causal else hidden  # later keys are hidden from all queries
    q, k, v = (x.view(*x.shape[:2], num_heads, -1).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal).transpose(1, 2).flatten(2)


class FixedContext:
    """A context that many calls attend to: each layer's keys and values of it are computed at the first.

    Args:
        states: [B, M, context_dim].
    """

    def __init__(self, states: Tensor) -> None:
        self.states = states
        self._made: dict[nn.Module, tuple[Tensor, Tensor, Tensor | None]] = {}

    def __len__(self) -> int:
        return len(self.states)

    def seen_by(self, layer: Attention) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values of a layer whose weights stay as they are, as `in_lanes` gives them."""
        made = self._made.get(layer)
        # What was made in inference mode cannot be kept for a backward pass.
        if made is None or (made[0].is_inference() and torch.is_grad_enabled()):
            made = self._made[layer] = in_lanes(layer.to_k(self.states), layer.to_v(self.states))
        return made


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
        self.to_q = Linear(dim, dim, bias=bias)
        self.to_k = Linear(context_dim or dim, dim, bias=bias)
        self.to_v = Linear(context_dim or dim, dim, bias=bias)
        self.to_out = nn.ModuleList([Linear(dim, dim)])

    def forward(self, x: Tensor, context: Tensor | FixedContext | None = None) -> Tensor:
        """[B, L, D] and [R·B, M, context_dim] → [R·B, L, D]: each query meets R contexts."""
        mask = None
        if isinstance(context, FixedContext):
            key, value, mask = context.seen_by(self)
        else:
            context = x if context is None else context
            key, value = self.to_k(context), self.to_v(context)
        hidden = attend(repeated(self.to_q(x), len(key)), key, value, self.num_heads, mask=mask)
        projected: Tensor = self.to_out[0](hidden)
        return projected


class FeedForward(nn.Module):
    """W (value · gelu(gate)), value and gate linear in the input and four times as wide: GEGLU (Shazeer 2020,
    arXiv:2002.05202, eq. 6) and the way back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # The names in the files are net.0.proj and net.2: between them diffusers has a dropout.
        both_halves = nn.ModuleDict({"proj": nn.Linear(dim, 8 * dim)})
        self.net = nn.ModuleList([both_halves, nn.Identity(), nn.Linear(4 * dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] → [B, L, D]."""
        proj, out = self.net[0]["proj"], self.net[2]  # type: ignore[index]
        return geglu_linear(x, proj, out)  # type: ignore[arg-type]


class BasicTransformerBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward: each after a layer norm and added to its input."""

    def __init__(self, dim: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, None, num_heads, bias=False)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, context_dim, num_heads, bias=False)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor | FixedContext) -> Tensor:
        """[B, L, D] and [R·B, M, context_dim] → [R·B, L, D]."""
        # A sum takes the memory order of its first term. The tokens of an NCHW image are strided, those after
        # a linear layer are not, so in this order the strides vanish without a copy of their own.
        x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), context) + repeated(x, len(context))
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
    """

    def __init__(
        self, channels: int, context_dim: int, num_heads: int, num_layers: int, *, groups: int, linear: bool
    ) -> None:
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, context_dim, num_heads) for _ in range(num_layers)
        )
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor | FixedContext) -> Tensor:
        """[B, C, H, W] and [R·B, M, context_dim] → [R·B, C, H, W]."""
        height, width = x.shape[-2:]
        hidden = self.norm(x)
        tokens = self._project(self.proj_in, tokens_of(hidden))
        for block in self.transformer_blocks:
            tokens = self.run(block, tokens, context)
        return repeated(x, len(tokens)) + image_of(self._project(self.proj_out, tokens), height, width)

    def _project(self, layer: nn.Module, tokens: Tensor) -> Tensor:
        """A linear layer, or a 1×1 convolution as one: on a CPU its own kernel has a third of the speed."""
        weight = layer.weight if self.linear else layer.weight.flatten(1)  # type: ignore[operator]
        return linear(tokens, weight, layer.bias)  # type: ignore[arg-type]


class AttentionBlock2D(Region, Attention):
    """One-headed self-attention over the pixels of a feature map, added to it: the autoencoder's."""

    def __init__(self, channels: int, *, groups: int, eps: float) -> None:
        super().__init__(channels, None, 1, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=eps)

    def forward(self, x: Tensor, context: Tensor | FixedContext | None = None) -> Tensor:
        """[B, C, H, W] → [B, C, H, W]."""
        attended = super().forward(tokens_of(self.group_norm(x)), context)
        return x + image_of(attended, *x.shape[-2:])
