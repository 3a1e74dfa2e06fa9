"""CLIP's configurations, of each tower and of both together, without torch: recipes are checked by them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from ldm_cli.core.models.model_config import Depth, Size, TransformersConfig, without_bookkeeping

Activation = Literal["quick_gelu", "gelu"]

# transformers would build a Vision Transformer for "clip" and leave its weights random.
_OWN_MODEL_TYPE = "clip_modified_resnet"


def _check_heads(hidden_size: int, num_attention_heads: int) -> None:
    """Raise ValueError unless the heads share the width evenly."""
    if hidden_size % num_attention_heads:
        raise ValueError(f"num_attention_heads={num_attention_heads} does not divide hidden_size={hidden_size}")


class CLIPTextConfig(TransformersConfig):
    """The text tower; fields as in transformers' CLIPTextConfig."""

    hugging_face_class: ClassVar[str] = "CLIPTextModel"

    model_type: Literal["clip_text_model"] = "clip_text_model"
    """Which network this is."""
    vocab_size: Size = 49408
    """Number of tokens."""
    hidden_size: Size = 512
    """Width of the Transformer."""
    intermediate_size: Size = 2048
    """Width of its feed-forward layers."""
    num_hidden_layers: Depth = 12
    """Number of layers."""
    num_attention_heads: Size = 8
    """Attention heads; must divide `hidden_size`."""
    max_position_embeddings: Size = 77
    """Longest token sequence, both special tokens included."""
    hidden_act: Activation = "quick_gelu"
    """`quick_gelu` is x·sigmoid(1.702 x); `gelu` the exact one."""
    layer_norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    """ε of the layer norms."""
    projection_dim: Size = 512
    """Size of the embedding of a text tower with projection; a CLIPModel has its own `projection_dim`."""
    bos_token_id: int | None = 49406
    """Start-of-text token."""
    eos_token_id: int = 49407
    """End-of-text token: features are pooled where it first occurs. 2 (legacy files): at the largest id."""
    pad_token_id: int | None = 1
    """Padding token; has no effect on the model."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_heads(self.hidden_size, self.num_attention_heads)
        return self


class CLIPVisionConfig(TransformersConfig):
    """The Vision Transformer; fields as in transformers' CLIPVisionConfig."""

    hugging_face_class: ClassVar[str] = "CLIPVisionModel"

    model_type: Literal["clip_vision_model"] = "clip_vision_model"
    """Which network this is: `clip_vision_model` is the ViT, `modified_resnet` OpenAI's ResNet."""
    hidden_size: Size = 768
    """Width of the Transformer."""
    intermediate_size: Size = 3072
    """Width of its feed-forward layers."""
    num_hidden_layers: Depth = 12
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
        _check_heads(self.hidden_size, self.num_attention_heads)
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size={self.patch_size} does not divide image_size={self.image_size}")
        return self


class ModifiedResNetConfig(TransformersConfig):
    """OpenAI's ResNet; transformers has no such network, so the fields are ours, after open_clip's."""

    hugging_face_class: ClassVar[str] = "ModifiedResNet"

    model_type: Literal["modified_resnet"] = "modified_resnet"
    """Which network this is: `clip_vision_model` is the ViT, `modified_resnet` OpenAI's ResNet."""
    layers: tuple[Depth, Depth, Depth, Depth] = (3, 4, 6, 3)
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


def _image_tower_kind(value: Any) -> str:
    found = value.get("model_type") if isinstance(value, Mapping) else getattr(value, "model_type", None)
    return "modified_resnet" if found == "modified_resnet" else "clip_vision_model"


ImageTowerConfig = Annotated[
    Annotated[CLIPVisionConfig, Tag("clip_vision_model")] | Annotated[ModifiedResNetConfig, Tag("modified_resnet")],
    Discriminator(_image_tower_kind),
]


class CLIPConfig(TransformersConfig):
    """Both towers and the joint space; fields as in transformers' CLIPConfig."""

    hugging_face_class: ClassVar[str] = "CLIPModel"

    model_type: Literal["clip"] = "clip"
    """Which network this is."""
    text_config: CLIPTextConfig = CLIPTextConfig()
    """The text tower."""
    vision_config: ImageTowerConfig = CLIPVisionConfig()
    """The image tower: a ViT, or with `model_type: modified_resnet` OpenAI's ResNet."""
    projection_dim: Size = 512
    """Size of the joint embedding."""
    logit_scale_init_value: float = 2.6592
    """First value of the logarithm of the logit scale: ln(1/0.07)."""

    @classmethod
    def from_hugging_face(cls, mapping: Mapping[str, Any]) -> Self:
        """Read a transformers CLIPConfig, also an old one with `text_config_dict`, `vision_config_dict`.

        As in transformers, `*_config_dict` wins over `*_config`, also with the defaults of the fields it lacks.

        Raises:
            ValueError: a tower's configuration is no object.
            pydantic.ValidationError: unknown keys and values that are not implemented, one entry each.
        """
        top = without_bookkeeping(cls, mapping)
        if top.get("model_type") == _OWN_MODEL_TYPE:
            top["model_type"] = "clip"
        towers: dict[str, type[TransformersConfig]] = {"text_config": CLIPTextConfig, "vision_config": CLIPVisionConfig}
        for name, tower in towers.items():
            values, legacy = top.get(name), top.pop(f"{name}_dict", None)
            if not all(isinstance(found, dict | None) for found in (values, legacy)):
                raise ValueError(f"{name} is no object")
            defaults = {} if legacy is None else tower().to_mapping()
            top[name] = without_bookkeeping(tower, {**(values or {}), **defaults, **(legacy or {})})
        return cls.from_mapping(top)

    def to_hugging_face(self, dtype: str = "float32") -> dict[str, Any]:
        """The config.json of this model; a ResNet is marked as a type of ours, which transformers refuses."""
        mapping = super().to_hugging_face(dtype)
        if isinstance(self.vision_config, ModifiedResNetConfig):
            mapping |= {"architectures": ["CLIPModelWithModifiedResNet"], "model_type": _OWN_MODEL_TYPE}
        return mapping
