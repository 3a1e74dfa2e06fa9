"""CLIP: an image tower and a text tower that map into one space (Radford et al. 2021, arXiv:2103.00020)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ldm_cli.core.models.checkpointing import Checkpointable
from ldm_cli.core.models.clip_config import CLIPConfig, ModifiedResNetConfig
from ldm_cli.core.models.clip_resnet import ModifiedResNet
from ldm_cli.core.models.clip_text import CLIPTextModel, CLIPTextModelWithProjection, CLIPTextTransformer, TextOutput
from ldm_cli.core.models.clip_vision import CLIPVisionModel, CLIPVisionTransformer, VisionOutput

__all__ = ["CLIPModel", "CLIPTextModel", "CLIPTextModelWithProjection", "CLIPVisionModel", "TextOutput", "VisionOutput"]


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
        return (self.get_text_features(input_ids), self.get_image_features(pixel_values), self.clamped_logit_scale)
