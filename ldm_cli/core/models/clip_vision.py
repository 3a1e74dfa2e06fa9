"""CLIP's Vision Transformer image tower (Dosovitskiy et al. 2021, arXiv:2010.11929; Radford et al. 2021)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ldm_cli.core.models.clip_text import Activation, check_heads
from ldm_cli.core.models.model_config import Size, TransformersConfig


class CLIPVisionConfig(TransformersConfig):
    """The Vision Transformer; fields as in transformers' CLIPVisionConfig."""

    hugging_face_class: ClassVar[str] = "CLIPVisionModel"

    model_type: Literal["clip_vision_model"] = "clip_vision_model"
    """Which network this is: `clip_vision_model` is the ViT, `modified_resnet` OpenAI's ResNet."""
    hidden_size: Size = 768
    """Width of the Transformer."""
    intermediate_size: Size = 3072
    """Width of its feed-forward layers."""
    num_hidden_layers: Size = 12
    """Number of layers."""
    num_attention_heads: Size = 12
    """Attention heads; must divide `hidden_size`."""
    num_channels: Size = 3
    """Image channels."""
    image_size: Size = 224
    """Height and width of the square image, in pixels."""
    patch_size: Size = 32
    """Height and width of a patch, in pixels; must divide `image_size`."""
    hidden_act: Activation = "quick_gelu"
    """`quick_gelu` is x·sigmoid(1.702 x); `gelu` the exact one."""
    layer_norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    """ε of the layer norms."""
    projection_dim: Size = 512
    """Size of the embedding of a tower with projection; a CLIPModel has its own `projection_dim`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_heads(self.hidden_size, self.num_attention_heads)
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size={self.patch_size} does not divide image_size={self.image_size}")
        return self
