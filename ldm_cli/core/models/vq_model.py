"""The autoencoder with a codebook (van den Oord et al. 2017, arXiv:1711.00937): images to a grid of integers and back.

Letters: B batch, K number of codes, D channels of a code, H W size of the images, h w size of the grid.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ldm_cli.core.models.autoencoder_kl import Decoder, Encoder, expect_multiple
from ldm_cli.core.models.checkpointing import Checkpointable
from ldm_cli.core.models.vq_model_config import VQModelConfig


class VectorQuantizer(nn.Module):
    """The codebook, `embedding.weight` [K, D]."""

    def __init__(self, num_codes: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_codes, channels)
        nn.init.uniform_(self.embedding.weight, -1.0 / num_codes, 1.0 / num_codes)

    def nearest(self, z: Tensor) -> Tensor:
        """Index of the code nearest to each vector: z [B, D, h, w] → int64 [B, h, w] (van den Oord et al., eq. 1)."""
        vectors = z.permute(0, 2, 3, 1)
        distances = torch.cdist(vectors.reshape(-1, z.shape[1]), self.embedding.weight.to(z.dtype))
        return distances.argmin(dim=1).view(vectors.shape[:-1])

    def codes(self, indices: Tensor) -> Tensor:
        """The codes of indices, int64 [B, h, w] in [0, K) → [B, D, h, w]."""
        codes: Tensor = self.embedding(indices)
        return codes.permute(0, 3, 1, 2).contiguous()


class VQModel(Checkpointable):
    """Images to indices and back. As a `Codec`, its latents are the vectors before they are quantized, scaled."""

    config_class = VQModelConfig

    def __init__(self, config: VQModelConfig) -> None:
        super().__init__()
        self.config = config
        latent, channels = config.latent_channels, config.code_channels
        self.encoder = Encoder(config, latent)
        self.quant_conv = nn.Conv2d(latent, channels, 1)
        self.quantize = VectorQuantizer(config.num_vq_embeddings, channels)
        self.post_quant_conv = nn.Conv2d(channels, latent, 1)
        self.decoder = Decoder(config)

    @property
    def channels(self) -> int:
        """D, the channels of the latents."""
        return self.config.code_channels

    @property
    def factor(self) -> int:
        """Image pixels per place of the grid, along each side."""
        return 1 << (len(self.config.block_out_channels) - 1)

    def encode_z(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] → vectors before they are quantized, z [B, D, h, w].

        Raises:
            ValueError: `factor` does not divide the height or the width.
        """
        expect_multiple(images, self.factor)
        z: Tensor = self.quant_conv(self.encoder(images))
        return z

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Codes [B, D, h, w] → images [B, 3, H, W], about [-1, 1], not clamped."""
        images: Tensor = self.decoder(self.post_quant_conv(codes))
        return images

    def encode_indices(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] → indices of their codes, int64 [B, h, w]; raises as `encode_z`."""
        return self.quantize.nearest(self.encode_z(images.to(self.encoder.conv_in.weight.dtype)))

    def decode_indices(self, indices: Tensor) -> Tensor:
        """Indices int64 [B, h, w] in [0, K) → images [B, 3, H, W], about [-1, 1], not clamped."""
        return self.decode_codes(self.quantize.codes(indices))

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] through their indices and back; raises as `encode_z`."""
        return self.decode_indices(self.encode_indices(images))

    def moments(self, images: Tensor) -> dict[str, Tensor]:
        """The vectors before they are quantized, `z`, as float32; raises as `encode_z`. See `Codec`."""
        return {"z": self.encode_z(images.to(self.encoder.conv_in.weight.dtype)).float()}

    def latents(self, moments: Mapping[str, Tensor], noise: Tensor | None = None) -> Tensor:
        """z · scale, whatever the noise: there is one latent for an image. See `Codec`."""
        return moments["z"] * self.config.scaling_factor

    def encode(self, images: Tensor) -> Tensor:
        """Images to latents; raises as `encode_z`. See `Codec`."""
        return self.latents(self.moments(images))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to images, through the codes nearest to them (Rombach et al. 2022, section 3.1). See `Codec`."""
        z = (latents / self.config.scaling_factor).to(self.encoder.conv_in.weight.dtype)
        return self.decode_indices(self.quantize.nearest(z))


def straight_through(z: Tensor, codes: Tensor) -> Tensor:
    """The value of `codes` with the gradient of `z`, which is passed on as it is (van den Oord et al., section 3.2)."""
    return codes.detach() + (z - z.detach())
