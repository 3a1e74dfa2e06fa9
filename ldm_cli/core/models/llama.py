"""A decoder-only Transformer with rotary positions, RMS norms and gated feed-forward layers (Touvron et al. 2023,
arXiv:2302.13971).

Parameter names are those of transformers' LlamaForCausalLM. Letters: B batch, L tokens, M tokens that a cache holds, D
width, H heads, G heads of keys and values, d width of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_cli.core.compiling import Region
from ldm_cli.core.models.checkpointing import Checkpointable, Checkpointed
from ldm_cli.core.models.llama_config import LlamaConfig


class KeyValueCache:
    """Keys and values of the tokens that a model has seen, in memory that is allocated once.

    Args:
        rows: B.
        length: M, the most tokens.
        like: a tensor of the model's type and device.
        is_static: whether attention sees all places and masks those that are empty: each token has the same shapes, as
            compiled code wants. Without, it sees the filled ones alone, which is less work.
    """

    def __init__(self, config: LlamaConfig, rows: int, length: int, like: Tensor, *, is_static: bool = False) -> None:
        shape = (config.num_hidden_layers, rows, config.key_value_heads, length, config.head_width)
        self._keys, self._values = like.new_zeros(shape), like.new_zeros(shape)
        self._places, self._is_static = torch.arange(length, device=like.device), is_static
        self._cos, self._sin = rotation(self._places, config, like.dtype)
        self._num_tokens = 0

    def take(self, num_tokens: int) -> tuple[Tensor, Tensor, Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]]:
        """Give the next L tokens their places.

        Returns:
            Cosine and sine of their rotation; for each layer keys and values of the places that are seen, the positions
            int64 [L], and whether each token sees each place, bool [L, M]; None: all see all.
        """
        new = slice(self._num_tokens, self._num_tokens + num_tokens)
        self._num_tokens = new.stop
        seen = slice(0, None if self._is_static else new.stop)
        positions, mask = self._places[new], None
        if self._is_static or num_tokens > 1:
            mask = self._places[seen] <= positions[:, None]
        keys, values = self._keys[:, :, :, seen], self._values[:, :, :, seen]
        layers = ((k, v, positions, mask) for k, v in zip(keys.unbind(), values.unbind(), strict=True))
        return self._cos[new], self._sin[new], layers


class LlamaForCausalLM(Checkpointable):
    """Token ids to the logits of the next token.

    Initialised as transformers does: normal, with the deviation `initializer_range`.
    """

    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = _Stack(config)
        self.lm_head = (
            None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=config.initializer_range)

    def forward(self, input_ids: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Run the model.

        Args:
            input_ids: int64 [B, L]; with a cache, the tokens after those that it holds.
            cache: takes the keys and values of these tokens.

        Returns:
            [B, L, V].
        """
        states = self.model(input_ids, cache)
        logits: Tensor = F.linear(states, self.head_weight) if self.lm_head is None else self.lm_head(states)
        return logits

    @property
    def head_weight(self) -> Tensor:
        """The weight of the last layer, [V, D]."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight


class _Stack(Checkpointed):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, input_ids: Tensor, cache: KeyValueCache | None) -> Tensor:
        """int64 [B, L] → states [B, L, D]."""
        states = self.embed_tokens(input_ids)
        if cache is None:
            places = torch.arange(input_ids.shape[1], device=input_ids.device)
            cos, sin = rotation(places, self.config, states.dtype)
            for layer in self.layers:
                states = self.run(layer, states, cos, sin)
        else:
            cos, sin, layers = cache.take(input_ids.shape[1])
            for layer, cached in zip(self.layers, layers, strict=True):
                states = layer(states, cos, sin, *cached)
        normed: Tensor = self.norm(states)
        return normed


class _Block(Region):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = _FeedForward(config)

    def forward(self, states: Tensor, cos: Tensor, sin: Tensor, *cached: Any) -> Tensor:
        """[B, L, D] → [B, L, D]; the rotation of the tokens; keys, values, positions and mask of a cache, if any."""
        states = states + self.self_attn(self.input_layernorm(states), cos, sin, *cached)
        hidden: Tensor = self.mlp(self.post_attention_layernorm(states))
        return states + hidden


class _Attention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.width, width = config.head_width, config.hidden_size
        inner, shared = config.num_attention_heads * self.width, config.key_value_heads * self.width
        self.is_grouped = shared < inner
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(width, shared, bias=False)
        self.v_proj = nn.Linear(width, shared, bias=False)
        self.o_proj = nn.Linear(inner, width, bias=False)

    def forward(self, states: Tensor, cos: Tensor, sin: Tensor, *cached: Any) -> Tensor:
        """See `_Block`."""
        q, k, v = (
            layer(states).unflatten(2, (-1, self.width)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        mask = None
        if cached:
            keys, values, positions, mask = cached
            # Under autocast the layers compute in another type than the cache has.
            k = keys.index_copy_(2, positions, k.to(keys.dtype))
            v = values.index_copy_(2, positions, v.to(values.dtype))
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=not cached, enable_gqa=self.is_grouped
        )
        projected: Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return projected


class _FeedForward(nn.Module):
    """down(silu(gate x) · up x) (Shazeer 2020, arXiv:2002.05202, eq. 6)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] → [B, L, D]."""
        hidden: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return hidden


def rotation(positions: Tensor, config: LlamaConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles by which pairs of coordinates turn, each [L, d] (Su et al. 2021, eq. 34).

    Args:
        positions: int64 [L].
        config: width d of a head and base θ: pair i turns by position · θ^(−2i / d).
        dtype: of the result; angles are float32.
    """
    pairs = torch.arange(0, config.head_width, 2, device=positions.device)
    angles = positions[:, None].float() / config.rope_theta ** (pairs.float() / config.head_width)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, H, L, d] with coordinates i and i + d/2 turned as a pair, by angles whose cosine and sine are [L, d]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
