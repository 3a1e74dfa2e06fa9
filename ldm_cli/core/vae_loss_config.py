"""The configuration of the autoencoder's loss, without torch: recipes are checked by it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ldm_cli.config import Config, NamesModel

Weight = Annotated[float, Field(ge=0)]


class VAELossConfig(Config):
    """Weights of the terms; a term of weight 0 is not computed."""

    reconstruction: Literal["l1", "l2"] = "l1"
    """Absolute or squared difference, averaged over pixels and channels."""
    kl_weight: Weight = 1e-6
    """Weight of the KL term, which is summed over the latent and divided by the number of image values, so
    that published weights (Rombach et al. 2022: 1e-6) mean the same here."""
    perceptual_weight: Weight = 0.0
    """Weight of the distance between CLIP image-tower features."""
    perceptual_clip: Annotated[str | None, NamesModel()] = None
    """The CLIPModel (`train-clip`) that the perceptual term uses."""
    adversarial_weight: Weight = 0.0
    """Weight of the patch discriminator's term; times the adaptive weight if that is on."""
    adversarial_start: Annotated[int, Field(ge=0)] = 0
    """Last step without the adversarial term; the discriminator starts to learn there, too."""
    adversarial_adaptive: bool = True
    """Balance the term by the ratio of gradients at the decoder's last layer (Esser et al. 2021, eq. 7)."""
    discriminator_channels: Annotated[int, Field(ge=8, multiple_of=8)] = 64
    """Channels of the discriminator's first layer."""
    discriminator_layers: Annotated[int, Field(ge=1, le=5)] = 3
    """Stride-2 layers of the discriminator after the first."""

    @model_validator(mode="after")
    def _check(self) -> VAELossConfig:
        if self.perceptual_weight > 0 and self.perceptual_clip is None:
            raise ValueError(f"perceptual_weight={self.perceptual_weight} needs perceptual_clip, a CLIPModel")
        return self


def min_image_size(num_layers: int) -> int:
    """Smallest side of an image, in pixels, that a discriminator of so many layers works on."""
    return int(3 * 2**num_layers)
