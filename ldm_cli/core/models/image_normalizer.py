"""Mean and deviation of the image embeddings that an unCLIP decoder is trained on, and the noise that is added to them.

Parameter names are those of diffusers' StableUnCLIPImageNormalizer. Letters: B batch, E size of an embedding.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ldm_cli.core.diffusion.loss import add_noise
from ldm_cli.core.diffusion.process import Process
from ldm_cli.core.models.layers import timestep_embedding
from ldm_cli.core.models.model_config import DiffusersConfig, Size


class ImageNormalizerConfig(DiffusersConfig):
    """All fields of diffusers' StableUnCLIPImageNormalizer, with its defaults."""

    hugging_face_class: ClassVar[str] = "StableUnCLIPImageNormalizer"

    embedding_dim: Size = 768
    """Size of the embeddings."""


class ImageNormalizer(nn.Module):
    """Embeddings to mean 0 and deviation 1, and back; `mean` and `std`, [1, E], are measured and not trained."""

    config_class = ImageNormalizerConfig

    def __init__(self, config: ImageNormalizerConfig) -> None:
        super().__init__()
        self.config = config
        self.mean = nn.Parameter(torch.zeros(1, config.embedding_dim), requires_grad=False)
        self.std = nn.Parameter(torch.ones(1, config.embedding_dim), requires_grad=False)

    @classmethod
    def of(cls, mean: Tensor, std: Tensor) -> ImageNormalizer:
        """With this mean and deviation, [1, E]; float32, on their device."""
        normalizer = cls(ImageNormalizerConfig(embedding_dim=mean.shape[1]))
        normalizer.mean = nn.Parameter(mean.detach().float(), requires_grad=False)
        normalizer.std = nn.Parameter(std.detach().float(), requires_grad=False)
        return normalizer

    @classmethod
    def measured(cls, embeddings: Tensor) -> ImageNormalizer:
        """With mean and deviation of embeddings [N, E]; 1 for a deviation of 0."""
        std, mean = torch.std_mean(embeddings.double(), dim=0, keepdim=True)
        return cls.of(mean, torch.where(std > 0, std, 1.0))

    def normalised(self, embeddings: Tensor) -> Tensor:
        """Embeddings [B, E] → mean 0 and deviation 1."""
        return (embeddings.float() - self.mean) / self.std

    def restored(self, z: Tensor) -> Tensor:
        """The inverse of `normalised`."""
        return z * self.std + self.mean

    def augmented(self, embeddings: Tensor, u: Tensor, noise: Tensor, process: Process) -> Tensor:
        """What a decoder is conditioned on: noised embeddings, and the sinusoids of their noise level (Ramesh et al.
        2022, section 2.1, arXiv:2204.06125; Stable unCLIP).

        Args:
            embeddings: [B, E].
            u: [B], the share of levels with less noise, as for `Process.at`.
            noise: standard normal, [B, E].

        Returns:
            float32 [B, 2E].
        """
        a, b, level = process.at(u)
        z = add_noise(self.normalised(embeddings), noise, a, b)
        waves = timestep_embedding(level, embeddings.shape[1], flip_sin_to_cos=True, freq_shift=0)
        return torch.cat([self.restored(z), waves], dim=1)
