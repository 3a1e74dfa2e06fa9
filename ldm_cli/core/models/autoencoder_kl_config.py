"""The autoencoder's configuration, without torch: recipes are checked by it."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ldm_cli.core.models.model_config import Depth, DiffusersConfig, Size, list_of, plain_blocks


class AutoencoderConfig(DiffusersConfig):
    """Encoder and decoder, as several classes of diffusers have them."""

    in_channels: Size = 3
    """Channels of the image."""
    out_channels: Size = 3
    """Channels of the reconstruction."""
    block_out_channels: tuple[Size, ...] = (64,)
    """Channels per level, outermost first; each level but the last halves height and width."""
    down_block_types: tuple[Literal["DownEncoderBlock2D", "AttnDownEncoderBlock2D"], ...] = Field(
        default_factory=plain_blocks(*["DownEncoderBlock2D"] * 3)
    )
    """One per level of the encoder; `Attn…` has self-attention after each residual block. Default: all plain."""
    up_block_types: tuple[Literal["UpDecoderBlock2D", "AttnUpDecoderBlock2D"], ...] = Field(
        default_factory=plain_blocks(*["UpDecoderBlock2D"] * 3)
    )
    """One per level of the decoder. Default: all plain."""
    layers_per_block: Depth = 1
    """Residual blocks per level of the encoder; the decoder has one more."""
    act_fn: Literal["silu", "swish"] = "silu"
    """Activation; `swish` is another name of the same."""
    latent_channels: Size = 4
    """Channels of the latent."""
    norm_num_groups: Size = 32
    """Groups of the group norms; must divide every entry of `block_out_channels`."""
    sample_size: Size | tuple[Size, Size] = 32
    """Height and width of training images, in pixels; for information."""
    scaling_factor: Annotated[float, Field(gt=0)] = 0.18215
    """Latents are z × scale, with (z − shift) for z where there is a shift, so that their deviation is about 1."""
    mid_block_add_attention: bool = True
    """Self-attention at the lowest resolution."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        levels = len(self.block_out_channels)
        if levels == 0:
            raise ValueError("block_out_channels is empty; at least one level is needed")
        for name in ("down_block_types", "up_block_types"):
            if len(getattr(self, name)) != levels:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries, block_out_channels has {levels}")
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"norm_num_groups={self.norm_num_groups} does not divide {channels} of block_out_channels"
                )
        return self


class AutoencoderKLConfig(AutoencoderConfig):
    """The autoencoder; fields as in diffusers' AutoencoderKL."""

    hugging_face_class: ClassVar[str] = "AutoencoderKL"

    shift_factor: float | None = None
    """Mean of z, subtracted before scaling; null is 0."""
    latents_mean: Annotated[None, list_of(0.0, None)] = None
    """Per-channel means are not supported, except zeros."""
    latents_std: Annotated[None, list_of(1.0, None)] = None
    """Per-channel deviations are not supported, except ones."""
    force_upcast: bool = True
    """Decode in fp32 even where the pipeline runs in fp16, because activations overflow."""
    use_quant_conv: bool = True
    """1×1 convolution after the encoder."""
    use_post_quant_conv: bool = True
    """1×1 convolution before the decoder."""
