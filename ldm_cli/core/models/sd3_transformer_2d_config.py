"""The configuration of Stable Diffusion 3's transformer, without torch: recipes are checked by it."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ldm_cli.core.models.model_config import Depth, DiffusersConfig, Size


class SD3Transformer2DConfig(DiffusersConfig):
    """The transformer; all fields of diffusers' SD3Transformer2DModel, with its defaults."""

    hugging_face_class: ClassVar[str] = "SD3Transformer2DModel"

    sample_size: Size = 128
    """Height and width of the latents whose patches have the positions 0, 1, 2, …; other sizes are scaled to them."""
    patch_size: Size = 2
    """Height and width of a patch in latent pixels."""
    in_channels: Size = 16
    """Channels of the noisy latent, plus those of what is concatenated to it."""
    num_layers: Depth = 18
    """Joint blocks."""
    attention_head_dim: Size = 64
    """Width of an attention head."""
    num_attention_heads: Size = 18
    """Attention heads; the width of the network is this times `attention_head_dim`."""
    joint_attention_dim: Size = 4096
    """Width of the text tokens."""
    caption_projection_dim: Size = 1152
    """Width of the text tokens inside the network: `attention_head_dim` × `num_attention_heads`."""
    pooled_projection_dim: Size = 2048
    """Width of the pooled text."""
    out_channels: Size = 16
    """Channels of the prediction."""
    pos_embed_max_size: Annotated[int, Field(ge=1, le=2**12)] = 96
    """Side of the square table of positions, in patches: the largest height and width."""
    dual_attention_layers: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Indices of the blocks whose image tokens also attend to themselves alone (Stable Diffusion 3.5 medium)."""
    qk_norm: Literal["rms_norm"] | None = None
    """Root-mean-square norm of queries and keys (Stable Diffusion 3.5)."""

    @property
    def width(self) -> int:
        """Width of the tokens."""
        return self.attention_head_dim * self.num_attention_heads

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.caption_projection_dim != self.width:
            raise ValueError(
                f"caption_projection_dim={self.caption_projection_dim}, but attention_head_dim × num_attention_heads "
                f"is {self.width}"
            )
        if self.width % 4:
            raise ValueError(f"the width {self.width} is no multiple of 4, as the table of positions needs")
        if self.dual_attention_layers and max(self.dual_attention_layers) >= self.num_layers:
            raise ValueError(f"dual_attention_layers={self.dual_attention_layers}, but num_layers={self.num_layers}")
        if self.patch_size > self.sample_size:
            raise ValueError(f"patch_size={self.patch_size} is larger than sample_size={self.sample_size}")
        return self
