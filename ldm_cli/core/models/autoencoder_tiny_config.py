"""The tiny autoencoder's configuration, without torch."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ldm_cli.core.models.model_config import DiffusersConfig, Size, Zero

TinyActivation = Literal["relu", "silu", "swish", "gelu", "mish"]
BlockCount = Annotated[int, Field(ge=0, le=1000)]


class AutoencoderTinyConfig(DiffusersConfig):
    """The tiny autoencoder; all fields of diffusers' AutoencoderTiny, with the values that are implemented."""

    hugging_face_class: ClassVar[str] = "AutoencoderTiny"

    in_channels: Size = 3
    """Channels of the image."""
    out_channels: Size = 3
    """Channels of the reconstruction."""
    encoder_block_out_channels: tuple[Size, ...] = (64, 64, 64, 64)
    """Channels per level of the encoder, all the same; each level but the first halves height and width."""
    decoder_block_out_channels: tuple[Size, ...] = (64, 64, 64, 64)
    """Channels per level of the decoder, all the same; each level but the last doubles height and width."""
    block_out_channels: tuple[Size, ...] | None = None
    """diffusers repeats `decoder_block_out_channels` here; has no effect."""
    act_fn: TinyActivation = "relu"
    """Activation within the blocks; `swish` is another name of `silu`."""
    upsample_fn: Literal["nearest"] = "nearest"
    """How the decoder enlarges."""
    latent_channels: Size = 4
    """Channels of the latent."""
    upsampling_scaling_factor: Literal[2] = 2
    """Enlargement of each level of the decoder."""
    num_encoder_blocks: tuple[BlockCount, ...] = (1, 3, 3, 3)
    """Residual blocks per level of the encoder."""
    num_decoder_blocks: tuple[BlockCount, ...] = (3, 3, 3, 1)
    """Residual blocks per level of the decoder."""
    latent_magnitude: float = 3
    """Has no effect: it is for latents that are stored as bytes."""
    latent_shift: float = 0.5
    """Has no effect: it is for latents that are stored as bytes."""
    force_upcast: bool = False
    """Has no effect: activations do not overflow in fp16."""
    scaling_factor: Annotated[float, Field(gt=0)] = 1.0
    """Latents are z × scale."""
    shift_factor: Zero | None = 0.0
    """Not supported."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for side in ("encoder", "decoder"):
            channels, blocks = getattr(self, f"{side}_block_out_channels"), getattr(self, f"num_{side}_blocks")
            if not channels or len(set(channels)) > 1:
                raise ValueError(f"{side}_block_out_channels={list(channels)}; expected one number, once per level")
            if len(blocks) != len(channels):
                raise ValueError(
                    f"num_{side}_blocks has {len(blocks)} entries, {side}_block_out_channels {len(channels)}"
                )
        levels = len(self.encoder_block_out_channels), len(self.decoder_block_out_channels)
        if levels[0] != levels[1]:
            raise ValueError(f"the encoder has {levels[0]} levels, the decoder {levels[1]}")
        return self

    def to_hugging_face(self) -> dict[str, Any]:
        """The complete config.json that diffusers would write for this model."""
        return {**super().to_hugging_face(), "block_out_channels": list(self.decoder_block_out_channels)}
