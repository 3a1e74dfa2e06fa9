"""The patch discriminator of the autoencoder's adversarial loss."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from ldm_cli.core.vae_loss_config import min_image_size


class PatchDiscriminator(nn.Sequential):
    """Judges overlapping patches of an image as real or not (Isola et al. 2017, arXiv:1611.07004, 6.1.2).

    Group norm stands in for batch norm, so that the output for one image does not depend on its neighbours.

    Args:
        channels: channels after the first convolution; doubled per layer up to eight times.
        num_layers: stride-2 layers; the receptive field of an output is 34 px with 2 and 70 px with 3.
    """

    def __init__(self, channels: int = 64, num_layers: int = 3, in_channels: int = 3) -> None:
        widths = [channels * min(2**i, 8) for i in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (narrow, wide) in enumerate(pairwise(widths), start=1):
            stride = 2 if i < num_layers else 1
            layers += [
                nn.Conv2d(narrow, wide, 4, stride, padding=1, bias=False),
                nn.GroupNorm(8, wide),
                nn.LeakyReLU(0.2),
            ]
        super().__init__(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.min_size = min_image_size(num_layers)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 1, H', W'] of images [B, C, H, W] in [−1, 1]: positive means real.

        Raises:
            ValueError: the image is too small for `num_layers`.
        """
        if min(images.shape[-2:]) < self.min_size:
            raise ValueError(f"images of {tuple(images.shape[-2:])} px, the discriminator needs {self.min_size}")
        outputs: Tensor = super().forward(images)  # type: ignore[no-untyped-call]
        return outputs


def hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Discriminator's hinge loss (Lim & Ye 2017, arXiv:1705.02894, eq. 4), halved."""
    return 0.5 * (torch.relu(1.0 - real_logits).mean() + torch.relu(1.0 + fake_logits).mean())
