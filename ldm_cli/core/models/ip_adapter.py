"""IP-Adapter (Ye et al. 2023, arXiv:2308.06721): pictures as tokens, and keys and values for them in a U-Net's layers.

Parameter names are those of the published files. Letters: B batch, N tokens of a picture, D width of the U-Net's text
tokens, L patches and class token of the image tower, E width of what the tower gives, W width of the resampler.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ldm_cli.core.image_prompt_config import HEAD_WIDTH, Kind
from ldm_cli.core.models.attention import Attention, attend

NUM_RESAMPLER_LAYERS = 4
"""As in all published files; diffusers reads no other number."""
_PARTS = ("down_blocks", "up_blocks", "mid_block")


class ImageProjection(nn.Module):
    """Tokens of the embedding of a picture: the kind `base`."""

    def __init__(self, image_dim: int, dim: int, num_tokens: int) -> None:
        super().__init__()
        self.num_tokens, self.image_dim = num_tokens, image_dim
        self.proj = nn.Linear(image_dim, num_tokens * dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Tensor) -> Tensor:
        """[B, E] → [B, N, D]."""
        tokens: Tensor = self.norm(self.proj(image).unflatten(1, (self.num_tokens, -1)))
        return tokens


class _PerceiverAttention(nn.Module):
    """Attention of the latents to the picture and to themselves (Alayrac et al. 2022, arXiv:2204.14198, A.1.1)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, inner = num_heads, num_heads * HEAD_WIDTH
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, image: Tensor, latents: Tensor) -> Tensor:
        """[B, L, W] and [B, N, W] → [B, N, W]."""
        latents = self.norm2(latents)
        key, value = self.to_kv(torch.cat([self.norm1(image), latents], dim=1)).chunk(2, dim=-1)
        attended: Tensor = self.to_out(attend(self.to_q(latents), key, value, self.num_heads))
        return attended


class _ResamplerLayer(nn.ModuleList):
    """Attention, then a feed-forward network; each is added to its input."""

    def __init__(self, width: int, num_heads: int) -> None:
        inner, outer = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        feed_forward = nn.Sequential(nn.LayerNorm(width), inner, nn.GELU(), outer)
        super().__init__([_PerceiverAttention(width, num_heads), feed_forward])

    def forward(self, image: Tensor, latents: Tensor) -> Tensor:
        """[B, L, W] and [B, N, W] → [B, N, W]."""
        attention, feed_forward = self
        latents = attention(image, latents) + latents
        result: Tensor = feed_forward(latents) + latents
        return result


class Resampler(nn.Module):
    """Tokens of the states of a picture's patches: the kind `plus`."""

    def __init__(self, image_dim: int, dim: int, num_tokens: int, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_tokens, self.image_dim = num_tokens, image_dim
        self.latents = nn.Parameter(torch.randn(1, num_tokens, width) / width**0.5)
        self.proj_in = nn.Linear(image_dim, width)
        self.proj_out = nn.Linear(width, dim)
        self.norm_out = nn.LayerNorm(dim)
        self.layers = nn.ModuleList(_ResamplerLayer(width, num_heads) for _ in range(NUM_RESAMPLER_LAYERS))

    def forward(self, image: Tensor) -> Tensor:
        """[B, L, E] → [B, N, D]."""
        image, latents = self.proj_in(image), self.latents.expand(len(image), -1, -1)
        for layer in self.layers:
            latents = layer(image, latents)
        tokens: Tensor = self.norm_out(self.proj_out(latents))
        return tokens


class ImageAttention(nn.Module):
    """Keys and values for the tokens of a picture, in one layer of a U-Net."""

    def __init__(self, context_dim: int, dim: int) -> None:
        super().__init__()
        self.to_k_ip = nn.Linear(context_dim, dim, bias=False)
        self.to_v_ip = nn.Linear(context_dim, dim, bias=False)

    def forward(self, query: Tensor, tokens: Tensor, num_heads: int) -> Tensor:
        """Queries [B, M, dim] of the layer and tokens [B, N, D] → [B, M, dim]."""
        return attend(query, self.to_k_ip(tokens), self.to_v_ip(tokens), num_heads)


class IPAdapter(nn.Module):
    """What makes tokens of a picture, and attends to them; its state dict is a published file.

    Args:
        image_proj: `ImageProjection` or `Resampler`.
        layers: the layers of the U-Net that attend to text, as `cross_attentions` gives them.
    """

    def __init__(self, image_proj: ImageProjection | Resampler, layers: Mapping[int, Attention]) -> None:
        super().__init__()
        self.image_proj = image_proj
        self.ip_adapter = nn.ModuleDict()
        for number, layer in layers.items():
            self.ip_adapter[str(number)] = ImageAttention(layer.to_k.in_features, layer.to_k.out_features)

    @property
    def kind(self) -> Kind:
        """What it makes tokens of: see `ImagePromptConfig.kind`."""
        return "plus" if isinstance(self.image_proj, Resampler) else "base"

    @torch.no_grad()
    def begin_as_text(self, layers: Mapping[int, Attention]) -> None:
        """Take the keys and values of the layers' text as first ones for pictures."""
        for number, layer in layers.items():
            added = self.ip_adapter[str(number)]
            assert isinstance(added, ImageAttention)
            added.to_k_ip.weight.copy_(layer.to_k.weight)
            added.to_v_ip.weight.copy_(layer.to_v.weight)

    def forward(self, image: Tensor) -> Tensor:
        """What the image tower gives, [B, E] or [B, L, E] → tokens [B, N, D]."""
        tokens: Tensor = self.image_proj(image)
        return tokens


def cross_attentions(unet: nn.Module) -> dict[int, Attention]:
    """The layers of a U-Net that attend to text, under the numbers that files have for them.

    Files count the two attentions of each transformer block, first those of the way down, then of the way up, then of
    the middle. So text has the odd numbers, and the middle, although it precedes the way up, the last ones.
    """
    found = {name: module for name, module in unet.named_modules() if name.endswith(".attn2")}

    def place(name: str) -> list[int]:
        return [_PARTS.index(name.partition(".")[0]), *map(int, re.findall(r"\.(\d+)", name))]

    layers: dict[int, Attention] = {}
    for i, name in enumerate(sorted(found, key=place)):
        layer = found[name]
        assert isinstance(layer, Attention)
        layers[2 * i + 1] = layer
    return layers
