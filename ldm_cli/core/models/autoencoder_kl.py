"""The variational autoencoder of latent diffusion (Rombach et al. 2022, arXiv:2112.10752, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_cli.core.models.attention import AttentionBlock2D
from ldm_cli.core.models.autoencoder_kl_config import AutoencoderConfig, AutoencoderKLConfig
from ldm_cli.core.models.checkpointing import Checkpointable, Checkpointed
from ldm_cli.core.models.layers import Downsample2D, ResnetBlock2D, Upsample2D

_EPS = 1e-6


@dataclass(frozen=True)
class DiagonalGaussian:
    """What the encoder says about z: independent normals.

    Attributes:
        mean, logvar: [B, C, h, w].
    """

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> Self:
        """Split [B, 2C, h, w] into mean and logarithm of the variance, the latter clamped to [-30, 20]."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar.clamp(-30.0, 20.0))

    def sample(self, noise: Tensor) -> Tensor:
        """μ + σ·noise for standard normal noise (Kingma & Welling 2014, eq. 10): z [B, C, h, w]."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def mode(self) -> Tensor:
        """The most probable z: [B, C, h, w]."""
        return self.mean

    def kl(self) -> Tensor:
        """KL divergence from the standard normal, summed over C, h and w: float32 [B], in nats.

        Kingma & Welling 2014, arXiv:1312.6114, appendix B.
        """
        mean, logvar = self.mean.float(), self.logvar.float()
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(dim=(1, 2, 3))


def _resnet(in_channels: int, out_channels: int, groups: int) -> ResnetBlock2D:
    return ResnetBlock2D(in_channels, out_channels, embedding_dim=None, groups=groups, eps=_EPS)


class _MidBlock(Checkpointed):
    """Residual block, self-attention (optional), residual block."""

    def __init__(self, channels: int, groups: int, *, attention: bool) -> None:
        super().__init__()
        blocks = [AttentionBlock2D(channels, groups=groups, eps=_EPS)] if attention else []
        self.attentions = nn.ModuleList(blocks)
        self.resnets = nn.ModuleList(_resnet(channels, channels, groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.run(self.resnets[0], x)
        for attention in self.attentions:
            x = self.run(attention, x)
        result: Tensor = self.run(self.resnets[1], x)
        return result


class _Level(Checkpointed):
    """Residual blocks, each with self-attention after it where the level has attention."""

    def __init__(self, in_channels: int, channels: int, num_layers: int, groups: int, *, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            _resnet(in_channels if i == 0 else channels, channels, groups) for i in range(num_layers)
        )
        blocks = [AttentionBlock2D(channels, groups=groups, eps=_EPS) for _ in range(num_layers)] if attention else []
        self.attentions = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = self.run(resnet, x)
            if self.attentions:
                x = self.run(self.attentions[i], x)
        return x


class _EncoderLevel(_Level):
    """The blocks of a level, then a stride-2 convolution."""

    def __init__(
        self, in_channels: int, channels: int, num_layers: int, groups: int, *, attention: bool, resample: bool
    ) -> None:
        super().__init__(in_channels, channels, num_layers, groups, attention=attention)
        self.downsamplers = nn.ModuleList([Downsample2D(channels, asymmetric=True)] if resample else [])

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        for downsampler in self.downsamplers:
            x = downsampler(x)
        return x


class _DecoderLevel(_Level):
    """The blocks of a level, then an enlargement by two."""

    def __init__(
        self, in_channels: int, channels: int, num_layers: int, groups: int, *, attention: bool, resample: bool
    ) -> None:
        super().__init__(in_channels, channels, num_layers, groups, attention=attention)
        self.upsamplers = nn.ModuleList([Upsample2D(channels)] if resample else [])

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        for upsampler in self.upsamplers:
            x = upsampler(x, (2 * x.shape[-2], 2 * x.shape[-1]))
        return x


def _levels(
    kind: type[_EncoderLevel | _DecoderLevel], widths: Sequence[int], layers: int, groups: int, types: Sequence[str]
) -> nn.ModuleList:
    """A level of each width; all but the last change the size."""
    return nn.ModuleList(
        kind(before, width, layers, groups, attention="Attn" in name, resample=i < len(widths) - 1)
        for i, (before, width, name) in enumerate(zip((widths[0], *widths), widths, types, strict=False))
    )


class Encoder(nn.Module):
    """The encoder of an autoencoder: images to `out_channels` channels, smaller by a factor."""

    def __init__(self, config: AutoencoderConfig, out_channels: int) -> None:
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = _levels(_EncoderLevel, channels, config.layers_per_block, groups, config.down_block_types)
        self.mid_block = _MidBlock(channels[-1], groups, attention=config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(channels[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] → [B, out_channels, h, w]."""
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        encoded: Tensor = self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))
        return encoded


class Decoder(nn.Module):
    """The decoder of an autoencoder: `latent_channels` channels to images."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = _MidBlock(channels[0], groups, attention=config.mid_block_add_attention)
        self.up_blocks = _levels(_DecoderLevel, channels, config.layers_per_block + 1, groups, config.up_block_types)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """[B, C, h, w] → [B, 3, H, W]."""
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        image: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return image


def expect_multiple(images: Tensor, factor: int) -> None:
    """Raises ValueError if `factor` does not divide the height or the width of the images [B, 3, H, W]."""
    height, width = images.shape[-2:]
    if height % factor or width % factor:
        raise ValueError(f"image of {height}×{width} px: not a multiple of factor={factor}")


class AutoencoderKL(Checkpointable):
    """Images to latents and back: a `Codec`. PyTorch's default initialisation, as in latent diffusion.

    `config` may be replaced by a copy with the `scaling_factor` and `shift_factor` that were measured.
    """

    config_class = AutoencoderKLConfig

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config, 2 * channels)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if config.use_post_quant_conv else None

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.config.latent_channels

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel, along each side."""
        return 1 << (len(self.config.block_out_channels) - 1)

    def posterior(self, images: Tensor) -> DiagonalGaussian:
        """Images [B, 3, H, W] in [-1, 1] → posterior over z [B, C, H / f, W / f]; f is `factor`.

        Raises:
            ValueError: f does not divide the height or the width.
        """
        expect_multiple(images, self.factor)
        moments = self.encoder(images)
        return DiagonalGaussian.from_moments(moments if self.quant_conv is None else self.quant_conv(moments))

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] through the mode of their posterior and back; raises as `posterior`."""
        return self.decode_z(self.posterior(images).mode())

    def decode_z(self, z: Tensor) -> Tensor:
        """Posterior samples z [B, C, h, w] → images [B, 3, h·f, w·f], about [-1, 1], not clamped."""
        image: Tensor = self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))
        return image

    def moments(self, images: Tensor) -> dict[str, Tensor]:
        """The posterior's `mean` and `logvar` as float32; raises as `posterior`. See `Codec`."""
        posterior = self.posterior(images.to(self.encoder.conv_in.weight.dtype))
        return {"mean": posterior.mean.float(), "logvar": posterior.logvar.float()}

    def latents(self, moments: Mapping[str, Tensor], noise: Tensor | None = None) -> Tensor:
        """(z - shift) · scale, deviation about 1 (Rombach et al. 2022, appendix G). See `Codec`."""
        posterior = DiagonalGaussian(moments["mean"], moments["logvar"])
        z = posterior.mode() if noise is None else posterior.sample(noise)
        return (z - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

    def encode(self, images: Tensor) -> Tensor:
        """Images to the mode of their latents; raises as `posterior`. See `Codec`."""
        return self.latents(self.moments(images))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to images, by z = latents / scale + shift. See `Codec`."""
        z = latents / self.config.scaling_factor + (self.config.shift_factor or 0.0)
        return self.decode_z(z.to(self.decoder.conv_in.weight.dtype))
