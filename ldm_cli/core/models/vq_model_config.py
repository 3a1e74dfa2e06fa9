"""The configuration of the autoencoder with a codebook, without torch: recipes are checked by it."""

from __future__ import annotations

from typing import ClassVar, Literal

from ldm_cli.core.models.autoencoder_kl_config import AutoencoderConfig
from ldm_cli.core.models.model_config import Size


class VQModelConfig(AutoencoderConfig):
    """The autoencoder with a codebook; fields as in diffusers' VQModel."""

    hugging_face_class: ClassVar[str] = "VQModel"

    latent_channels: Size = 3
    """Channels between the encoder or decoder and the 1×1 convolutions around the codebook."""
    num_vq_embeddings: Size = 256
    """Codes of the codebook."""
    vq_embed_dim: Size | None = None
    """Channels of a code, and of the latents; null: `latent_channels`."""
    norm_type: Literal["group"] = "group"
    """Norms of the decoder."""
    lookup_from_codebook: bool = False
    """Whether diffusers' `decode` takes indices when quantization is switched off; has no effect here."""
    force_upcast: bool = False
    """Has no effect."""

    @property
    def code_channels(self) -> int:
        """Channels of a code."""
        return self.vq_embed_dim or self.latent_channels
