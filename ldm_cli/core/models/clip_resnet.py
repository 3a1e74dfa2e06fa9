"""CLIP's ResNet image tower, "ModifiedResNet" (Radford et al. 2021, arXiv:2103.00020, section 2.4)."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import model_validator

from ldm_cli.core.models.model_config import Size, TransformersConfig


class ModifiedResNetConfig(TransformersConfig):
    """OpenAI's ResNet; transformers has no such network, so the fields are ours, after open_clip's."""

    hugging_face_class: ClassVar[str] = "ModifiedResNet"

    model_type: Literal["modified_resnet"] = "modified_resnet"
    """Which network this is: `clip_vision_model` is the ViT, `modified_resnet` OpenAI's ResNet."""
    layers: tuple[Size, Size, Size, Size] = (3, 4, 6, 3)
    """Bottleneck blocks per stage; (3, 4, 6, 3) is RN50."""
    width: Size = 64
    """Channels after the stem, even; the last stage has 32 times as many."""
    heads: Size = 32
    """Heads of the attention pooling; must divide 32 × `width`."""
    num_channels: Size = 3
    """Image channels."""
    image_size: Size = 224
    """Height and width of the square image, in pixels; a multiple of 32."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % 2:
            raise ValueError(f"width={self.width} is odd; the stem halves it")
        if 32 * self.width % self.heads:
            raise ValueError(f"heads={self.heads} does not divide 32 * width={32 * self.width}")
        if self.image_size % 32:
            raise ValueError(f"image_size={self.image_size} is not a multiple of the total stride 32")
        return self
