"""DINOv2, a Vision Transformer whose features judge pictures (Oquab et al. 2023, arXiv:2304.07193).

Parameter names are those of the files that transformers' Dinov2Model reads and writes.
Letters: B batch, L tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_cli.core.models.attention import attend, image_of, tokens_of
from ldm_cli.core.models.dinov2_config import Dinov2Config


class _Embeddings(nn.Module):
    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.side = config.image_size // patch
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        if config.use_mask_token:
            self.mask_token = nn.Parameter(torch.zeros(1, width))
        self.position_embeddings = nn.Parameter(torch.randn(1, self.side**2 + 1, width))
        self.patch_embeddings = nn.ModuleDict({"projection": nn.Conv2d(config.num_channels, width, patch, patch)})

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches: Tensor = self.patch_embeddings["projection"](pixel_values)
        positions = self._positions(*patches.shape[-2:])
        token = self.cls_token.expand(len(patches), 1, -1)
        return torch.cat((token, tokens_of(patches)), dim=1) + positions

    def _positions(self, height: int, width: int) -> Tensor:
        """[1, 1 + height · width, D], interpolated between the trained places where the image has another size."""
        if (height, width) == (self.side, self.side):
            return self.position_embeddings
        token, places = self.position_embeddings[:, :1], self.position_embeddings[:, 1:]
        plane = image_of(places, self.side, self.side)
        return torch.cat((token, tokens_of(F.interpolate(plane, (height, width), mode="bicubic"))), dim=1)


class _SelfAttention(nn.Module):
    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        self.num_heads, width = config.num_attention_heads, config.hidden_size
        names = ("query", "key", "value")
        self.attention = nn.ModuleDict({name: nn.Linear(width, width, config.qkv_bias) for name in names})
        self.output = nn.ModuleDict({"dense": nn.Linear(width, width)})

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (projection(x) for projection in self.attention.values())
        found: Tensor = self.output["dense"](attend(query, key, value, self.num_heads))
        return found


class _LayerScale(nn.Module):
    """A factor for each channel (Touvron et al. 2021, arXiv:2103.17239, eq. 2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.lambda1


class _MLP(nn.Module):
    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        inner = config.hidden_size * config.mlp_ratio
        self.fc1, self.fc2 = nn.Linear(config.hidden_size, inner), nn.Linear(inner, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return found


class _SwiGLU(nn.Module):
    """(SiLU(a) · b) W with a, b the halves of one projection (Shazeer 2020, arXiv:2002.05202, eq. 6)."""

    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        # Two thirds of the width of `_MLP`, rounded up to a multiple of 8: as many parameters.
        inner = (config.hidden_size * config.mlp_ratio * 2 // 3 + 7) // 8 * 8
        self.weights_in = nn.Linear(config.hidden_size, 2 * inner)
        self.weights_out = nn.Linear(inner, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.weights_in(x).chunk(2, dim=-1)
        found: Tensor = self.weights_out(F.silu(gate) * value)
        return found


class _Layer(nn.Module):
    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attention = _SelfAttention(config)
        self.mlp = _SwiGLU(config) if config.use_swiglu_ffn else _MLP(config)
        self.layer_scale1, self.layer_scale2 = _LayerScale(width), _LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer_scale1(self.attention(self.norm1(x)))
        found: Tensor = x + self.layer_scale2(self.mlp(self.norm2(x)))
        return found


class Dinov2Model(nn.Module):
    """The network, for evaluation."""

    config_class = Dinov2Config

    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        self.config = config
        self.embeddings = _Embeddings(config)
        self.encoder = nn.ModuleDict(
            {"layer": nn.Sequential(*(_Layer(config) for _ in range(config.num_hidden_layers)))}
        )
        self.layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] → [B, D], the class token after the last layer norm."""
        found: Tensor = self.layernorm(self.encoder["layer"](self.embeddings(pixel_values))[:, 0])
        return found
