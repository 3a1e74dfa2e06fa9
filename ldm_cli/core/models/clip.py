"""CLIP: an image tower and a text tower that map into one space (Radford et al. 2021, arXiv:2103.00020)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Tag

from ldm_cli.core.models.clip_resnet import ModifiedResNetConfig
from ldm_cli.core.models.clip_text import CLIPTextConfig
from ldm_cli.core.models.clip_vision import CLIPVisionConfig
from ldm_cli.core.models.model_config import Size, TransformersConfig, without_bookkeeping

__all__ = ["CLIPConfig", "CLIPTextConfig", "CLIPVisionConfig", "ModifiedResNetConfig"]


# transformers would build a Vision Transformer for "clip" and leave its weights random.
_OWN_MODEL_TYPE = "clip_modified_resnet"


def _image_tower_kind(value: Any) -> str:
    found = value.get("model_type") if isinstance(value, Mapping) else getattr(value, "model_type", None)
    return "modified_resnet" if found == "modified_resnet" else "clip_vision_model"


ImageTowerConfig = Annotated[
    Annotated[CLIPVisionConfig, Tag("clip_vision_model")]
    | Annotated[ModifiedResNetConfig, Tag("modified_resnet")],
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

        Raises:
            ValueError: `*_config_dict` contradicts `*_config`.
            pydantic.ValidationError: unknown keys and values that are not implemented, one entry each.
        """
        top = without_bookkeeping(cls, mapping)
        if top.get("model_type") == _OWN_MODEL_TYPE:
            top["model_type"] = "clip"
        towers: dict[str, type[TransformersConfig]] = {
            "text_config": CLIPTextConfig,
            "vision_config": CLIPVisionConfig,
        }
        for name, tower in towers.items():
            values = _merged(name, top.get(name) or {}, top.pop(f"{name}_dict", None) or {})
            top[name] = without_bookkeeping(tower, values)
        return cls.from_mapping(top)

    def to_hugging_face(self, dtype: str = "float32") -> dict[str, Any]:
        """The config.json of this model; with a ResNet it names a type of ours, so that transformers refuses it."""
        mapping = super().to_hugging_face(dtype)
        if isinstance(self.vision_config, ModifiedResNetConfig):
            mapping |= {"architectures": ["CLIPModelWithModifiedResNet"], "model_type": _OWN_MODEL_TYPE}
        return mapping


def _merged(name: str, values: Mapping[str, Any], legacy: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in legacy.items():
        if key in values and values[key] != value:
            raise ValueError(f"{name}_dict.{key}={value!r} contradicts {name}.{key}={values[key]!r}")
    return {**legacy, **values}
