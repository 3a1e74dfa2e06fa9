"""The blocks of Stable Diffusion 3's transformer (Esser et al. 2024, arXiv:2403.03206, figure 2).

Parameter names are those of diffusers. Letters: B batch, L image tokens, M text tokens, D width.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_cli.core.compiling import Region
from ldm_cli.core.models.attention import GELU, FeedForward

_EPS = 1e-6
_TANH_GELU = partial(GELU, approximate="tanh")


class Modulation(nn.Module):
    """Shifts, scales and gates of a block from the embedding of time and text."""

    def __init__(self, dim: int, num_parts: int) -> None:
        super().__init__()
        self.num_parts = num_parts
        self.linear = nn.Linear(dim, num_parts * dim)

    def forward(self, embedding: Tensor) -> tuple[Tensor, ...]:
        """The *activated* embedding [B, D] → parts of [B, 1, D] each."""
        return tuple(self.linear(embedding)[:, None].chunk(self.num_parts, dim=-1))


def modulated(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LN(x) (1 + scale) + shift, with a layer norm without parameters: [B, L, D] and [B, 1, D] → [B, L, D]."""
    return F.layer_norm(tokens, tokens.shape[-1:], eps=_EPS) * (1 + scale) + shift


class JointAttention(nn.Module):
    """Attention of image and text tokens to both, each with projections of its own.

    Args:
        dim: D.
        num_heads: divides D.
        qk_norm: normalise queries and keys per head.
        has_text: False for image tokens alone.
        keeps_text: False if the result for the text is not needed.
    """

    def __init__(self, dim: int, num_heads: int, *, qk_norm: bool, has_text: bool, keeps_text: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        if has_text:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.to_add_out = nn.Linear(dim, dim) if has_text and keeps_text else None
        norm = partial(nn.RMSNorm, dim // num_heads, eps=_EPS) if qk_norm else nn.Identity
        self.norm_q, self.norm_k = norm(), norm()
        if has_text:
            self.norm_added_q, self.norm_added_k = norm(), norm()

    def forward(self, image: Tensor, text: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """[B, L, D] and [B, M, D] → the same; None for text that is absent or not kept."""
        length = image.shape[1]
        query = self.norm_q(self._heads(self.to_q(image)))
        key = self.norm_k(self._heads(self.to_k(image)))
        value = self._heads(self.to_v(image))
        if text is not None:
            query = torch.cat([query, self.norm_added_q(self._heads(self.add_q_proj(text)))], dim=2)
            key = torch.cat([key, self.norm_added_k(self._heads(self.add_k_proj(text)))], dim=2)
            value = torch.cat([value, self._heads(self.add_v_proj(text))], dim=2)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        kept = None if self.to_add_out is None else self.to_add_out(attended[:, length:])
        return self.to_out[0](attended[:, :length]), kept

    def _heads(self, tokens: Tensor) -> Tensor:
        """[B, L, D] → [B, heads, L, D / heads]."""
        return tokens.view(*tokens.shape[:2], self.num_heads, -1).transpose(1, 2)


class JointTransformerBlock(Region):
    """One block for image and text tokens (Esser et al. 2024, figure 2).

    Args:
        dim: D.
        num_heads: divides D.
        qk_norm: normalise queries and keys.
        dual: the image tokens also attend to themselves alone.
        keeps_text: False in the last block, whose text tokens end there.
    """

    def __init__(self, dim: int, num_heads: int, *, qk_norm: bool, dual: bool, keeps_text: bool) -> None:
        super().__init__()
        self.norm1 = Modulation(dim, 9 if dual else 6)
        self.norm1_context = Modulation(dim, 6 if keeps_text else 2)
        self.attn = JointAttention(dim, num_heads, qk_norm=qk_norm, has_text=True, keeps_text=keeps_text)
        self.attn2: JointAttention | None = None
        if dual:
            self.attn2 = JointAttention(dim, num_heads, qk_norm=qk_norm, has_text=False, keeps_text=False)
        self.ff = FeedForward(dim, _TANH_GELU)
        self.ff_context = FeedForward(dim, _TANH_GELU) if keeps_text else None

    def forward(self, image: Tensor, text: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor | None]:
        """[B, L, D], [B, M, D] and the *activated* embedding [B, D] → image and text tokens; no text from the last."""
        shift, scale, gate, shift_ff, scale_ff, gate_ff, *dual = self.norm1(embedding)
        if self.ff_context is None:
            text_scale, text_shift = self.norm1_context(embedding)
        else:
            text_shift, text_scale, text_gate, text_shift_ff, text_scale_ff, text_gate_ff = self.norm1_context(
                embedding
            )
        attended, text_attended = self.attn(modulated(image, shift, scale), modulated(text, text_shift, text_scale))
        result = image + gate * attended
        if self.attn2 is not None:
            shift_2, scale_2, gate_2 = dual
            result = result + gate_2 * self.attn2(modulated(image, shift_2, scale_2))[0]
        result = result + gate_ff * self.ff(modulated(result, shift_ff, scale_ff))
        if self.ff_context is None:
            return result, None
        text = text + text_gate * text_attended
        return result, text + text_gate_ff * self.ff_context(modulated(text, text_shift_ff, text_scale_ff))
