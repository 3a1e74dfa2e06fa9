"""A small autoencoder without attention or norms, distilled from a large one (Bohan, "TAESD", 2023).

It has the latents of the autoencoder that it was distilled from, decodes them in a fraction of the time, and loses
detail: for previews, or as a codec of its own. Parameter names are those of diffusers' AutoencoderTiny.

Letters: B batch, C channels of the latent, H W size of the images, h w size of the latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_cli.core.models.autoencoder_tiny_config import AutoencoderTinyConfig, TinyActivation

_ACTIVATIONS: Mapping[TinyActivation, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "gelu": nn.GELU,
    "mish": nn.Mish,
}
_LARGEST = 3.0  # of |z| that the decoder tells apart


def _conv(in_channels: int, out_channels: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, stride=stride, bias=bias)


class _Block(nn.Module):
    """relu(x + three convolutions of x)."""

    def __init__(self, channels: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        inner = [_conv(channels, channels), activation(), _conv(channels, channels), activation()]
        self.conv = nn.Sequential(*inner, _conv(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


class _Encoder(nn.Module):
    def __init__(self, config: AutoencoderTinyConfig) -> None:
        super().__init__()
        channels, activation = config.encoder_block_out_channels[0], _ACTIVATIONS[config.act_fn]
        layers: list[nn.Module] = []
        for level, num_blocks in enumerate(config.num_encoder_blocks):
            layers.append(
                _conv(channels, channels, stride=2, bias=False) if level else _conv(config.in_channels, channels)
            )
            layers += [_Block(channels, activation) for _ in range(num_blocks)]
        self.layers = nn.Sequential(*layers, _conv(channels, config.latent_channels))

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] → z [B, C, h, w]."""
        z: Tensor = self.layers((images + 1) / 2)
        return z


class _Decoder(nn.Module):
    def __init__(self, config: AutoencoderTinyConfig) -> None:
        super().__init__()
        channels, activation = config.decoder_block_out_channels[0], _ACTIVATIONS[config.act_fn]
        layers: list[nn.Module] = [_conv(config.latent_channels, channels), activation()]
        for num_blocks in config.num_decoder_blocks[:-1]:
            layers += [_Block(channels, activation) for _ in range(num_blocks)]
            layers += [nn.Upsample(scale_factor=2, mode="nearest"), _conv(channels, channels, bias=False)]
        layers += [_Block(channels, activation) for _ in range(config.num_decoder_blocks[-1])]
        self.layers = nn.Sequential(*layers, _conv(channels, config.out_channels))

    def forward(self, z: Tensor) -> Tensor:
        """z [B, C, h, w] → [B, 3, H, W], about [-1, 1]."""
        images: Tensor = self.layers(_LARGEST * torch.tanh(z / _LARGEST))
        return 2 * images - 1


class AutoencoderTiny(nn.Module):
    """Images to latents and back: a `Codec`. There is no posterior: an image has one latent."""

    config_class = AutoencoderTinyConfig

    def __init__(self, config: AutoencoderTinyConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _Encoder(config)
        self.decoder = _Decoder(config)

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.config.latent_channels

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel, along each side."""
        return 1 << (len(self.config.num_encoder_blocks) - 1)

    def moments(self, images: Tensor) -> dict[str, Tensor]:
        """The latent before it is scaled, `z`, as float32. See `Codec`.

        Raises:
            ValueError: `factor` does not divide the height or the width.
        """
        height, width = images.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ValueError(f"image of {height}×{width} px: not a multiple of factor={self.factor}")
        weight: Tensor = next(self.encoder.parameters())
        return {"z": self.encoder(images.to(weight.dtype)).float()}

    def latents(self, moments: Mapping[str, Tensor], noise: Tensor | None = None) -> Tensor:
        """z · scale, whatever the noise: there is one latent for an image. See `Codec`."""
        return moments["z"] * self.config.scaling_factor

    def encode(self, images: Tensor) -> Tensor:
        """Images to latents; raises as `moments`. See `Codec`."""
        return self.latents(self.moments(images))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to images. See `Codec`."""
        weight: Tensor = next(self.decoder.parameters())
        images: Tensor = self.decoder((latents / self.config.scaling_factor).to(weight.dtype))
        return images
