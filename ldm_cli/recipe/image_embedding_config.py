"""The section of `train-unet` for a decoder of image embeddings."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ldm_cli.config import Config, NamesModel


class ImageEmbeddingConfig(Config):
    """unCLIP's decoder: the U-Net is also given the CLIP embedding of the picture, noised (Ramesh et al. 2022, section
    2.1)."""

    image_encoder: Annotated[str, NamesModel(("image_encoder",))]
    """The trained CLIPModel, or CLIPVisionModelWithProjection, that embeds pictures."""
    dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Chance that zeros take the place of an embedding, which guidance needs; captions are dropped independently."""
    num_measured: Annotated[int, Field(ge=2)] = 50_000
    """Most training pictures whose embeddings give mean and deviation."""
