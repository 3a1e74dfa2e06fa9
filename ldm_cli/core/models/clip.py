"""CLIP: an image tower and a text tower that map into one space (Radford et al. 2021, arXiv:2103.00020)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Discriminator, Tag
from torch import Tensor, nn

from ldm_cli.core.models.checkpointing import Checkpointable
from ldm_cli.core.models.clip_resnet import ModifiedResNet, ModifiedResNetConfig
from ldm_cli.core.models.clip_text import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTextTransformer,
    TextOutput,
)
from ldm_cli.core.models.clip_vision import (
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionTransformer,
    VisionOutput,
)
from ldm_cli.core.models.model_config import Size, TransformersConfig, without_bookkeeping

__all__ = [
    "IMAGE_MEAN",
    "IMAGE_STD",
    "CLIPConfig",
    "CLIPModel",
    "CLIPTextConfig",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPVisionConfig",
    "CLIPVisionModel",
    "ModifiedResNetConfig",
    "TextOutput",
    "VisionOutput",
    "normalize_images",
]

# Per-channel mean and deviation of OpenAI's training images, on a scale of [0, 1].
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


# transformers would build a Vision Transformer for "clip" and leave its weights random.
_OWN_MODEL_TYPE = "clip_modified_resnet"


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
        """The config.json of this model; a ResNet is marked as a type of ours, which transformers refuses."""
        mapping = super().to_hugging_face(dtype)
        if isinstance(self.vision_config, ModifiedResNetConfig):
            mapping |= {"architectures": ["CLIPModelWithModifiedResNet"], "model_type": _OWN_MODEL_TYPE}
        return mapping


def _merged(name: str, values: Mapping[str, Any], legacy: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in legacy.items():
        if key in values and values[key] != value:
            raise ValueError(f"{name}_dict.{key}={value!r} contradicts {name}.{key}={values[key]!r}")
    return {**legacy, **values}


def normalize_images(images: Tensor) -> Tensor:
    """What CLIP's image tower expects: (x / 255 - IMAGE_MEAN) / IMAGE_STD.

    Args:
        images: [B, 3, H, W] in [0, 255], uint8 or (for gradients with respect to pixels) any float.

    Returns:
        float32 [B, 3, H, W], about [-2, 2].
    """
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    return images.float() * (1.0 / (255.0 * std)) - mean / std


class CLIPModel(Checkpointable):
    """Image tower, text tower, their projections, and the scale of the logits.

    Projections are initialised as OpenAI's: normal with deviation D^-½. A ResNet projects in its attention
    pool, and there is no `visual_projection`.
    """

    config_class = CLIPConfig

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        text, vision = config.text_config, config.vision_config
        self.text_model = CLIPTextTransformer(text)
        self.vision_model: CLIPVisionTransformer | ModifiedResNet
        self.visual_projection: nn.Linear | None = None
        if isinstance(vision, ModifiedResNetConfig):
            self.vision_model = ModifiedResNet(vision, config.projection_dim)
        else:
            self.vision_model = CLIPVisionTransformer(vision)
            self.visual_projection = nn.Linear(vision.hidden_size, config.projection_dim, bias=False)
            nn.init.normal_(self.visual_projection.weight, std=vision.hidden_size**-0.5)
        self.text_projection = nn.Linear(text.hidden_size, config.projection_dim, bias=False)
        nn.init.normal_(self.text_projection.weight, std=text.hidden_size**-0.5)

    @property
    def clamped_logit_scale(self) -> Tensor:
        """exp(logit_scale), at most 100 to keep training stable (Radford et al. 2021, section 2.5): []."""
        return self.logit_scale.clamp(max=math.log(100.0)).exp()

    def get_text_features(self, input_ids: Tensor) -> Tensor:
        """Token ids, int64 [B, L] → [B, P] in the joint space, not normalised."""
        features: Tensor = self.text_projection(self.text_model(input_ids).pooled)
        return features

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] → [B, P] in the joint space, not normalised."""
        features: Tensor = self.vision_model(pixel_values).pooled
        return features if self.visual_projection is None else self.visual_projection(features)

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Both features, not normalised, and the logit scale: [B, P], [B, P], []; one call, for DDP."""
        return (
            self.get_text_features(input_ids),
            self.get_image_features(pixel_values),
            self.clamped_logit_scale,
        )
