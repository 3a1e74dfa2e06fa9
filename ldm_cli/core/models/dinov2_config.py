"""The configuration of DINOv2, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ldm_cli.core.models.model_config import Depth, Size, TransformersConfig

# Of training, of the first values of weights, and of other uses than the feature of an image.
_UNUSED = frozenset(
    {
        *("apply_layernorm", "attention_probs_dropout_prob", "drop_path_rate", "hidden_dropout_prob"),
        *("layerscale_value", "out_features", "out_indices", "reshape_hidden_states", "stage_names"),
    }
)


class Dinov2Config(TransformersConfig):
    """A Vision Transformer that was trained without labels; fields as in transformers' Dinov2Config."""

    hugging_face_class: ClassVar[str] = "Dinov2Model"

    model_type: Literal["dinov2"] = "dinov2"
    """Kind of the model in transformers."""
    hidden_size: Size = 768
    """Width of the Transformer."""
    num_hidden_layers: Depth = 12
    """Number of layers."""
    num_attention_heads: Size = 12
    """Attention heads; must divide `hidden_size`."""
    mlp_ratio: Size = 4
    """Width of the feed-forward layers, as a multiple of `hidden_size`."""
    hidden_act: Literal["gelu"] = "gelu"
    """Activation of the feed-forward layers."""
    use_swiglu_ffn: bool = False
    """Gated feed-forward layers, of the giant model."""
    qkv_bias: bool = True
    """Biases of query, key and value."""
    layer_norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    """ε of the layer norms."""
    image_size: Size = 224
    """Height and width of the images that the position embeddings are for; others interpolate them."""
    patch_size: Size = 14
    """Height and width of a patch, in pixels."""
    num_channels: Size = 3
    """Image channels."""
    use_mask_token: bool = True
    """The file has a mask token, which features of whole images do not take."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"num_attention_heads={self.num_attention_heads} does not divide {self.hidden_size}")
        return self

    @classmethod
    def from_hugging_face(cls, mapping: Mapping[str, Any]) -> Self:
        """See `TransformersConfig`."""
        return super().from_hugging_face({name: value for name, value in mapping.items() if name not in _UNUSED})
