"""CLIP's image tower as pipelines have it: pictures to embeddings, or to the states of their patches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ldm_cli.core.models.clip_config import CLIPConfig, CLIPVisionConfig
from ldm_cli.core.models.clip_image_processor import CLIPImageProcessor
from ldm_cli.core.models.clip_vision import CLIPVisionModelWithProjection
from ldm_cli.families.clip_folder import image_processor_for
from ldm_cli.families.family import model_sha256
from ldm_cli.formats.json_file import write_json
from ldm_cli.formats.model_folder import load_model, outline_model
from ldm_cli.formats.save_model import save_model
from ldm_cli.formats.weight_files import TRANSFORMERS_WEIGHTS

IMAGE_ENCODER = "image_encoder"
"""Its subfolder in a pipeline, and beside files of image prompt adapters."""


@dataclass(frozen=True, eq=False)
class CLIPImageEncoder:
    """An image tower with its projection, and how it wants its pictures.

    Attributes:
        model: the tower.
        processor: prepares pictures.
    """

    model: CLIPVisionModelWithProjection
    processor: CLIPImageProcessor

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype = torch.float32) -> Self:
        """Read a CLIPVisionModelWithProjection, or the image tower of a CLIPModel; errors as in `load_model`.

        Raises:
            CheckpointError: the tower is a ResNet; or its image processor gives pictures of another size.
        """
        model = load_model(CLIPVisionModelWithProjection, folder, vision_config_of, allow_extra=True, dtype=dtype)
        return cls(model, image_processor_for(model.config.image_size, folder))

    def embeddings(self, images: Tensor) -> Tensor:
        """Pictures uint8 [B, 3, H, W] → [B, projection_dim] in the joint space, not normalised."""
        return self.model.project(self.model(self._prepared(images)))

    def states(self, images: Tensor) -> Tensor:
        """Pictures uint8 [B, 3, H, W] → the states before the last layer, [B, 1 + patches, D]."""
        return self._states(self._prepared(images))

    def black_states(self) -> Tensor:
        """The states of a picture whose prepared pixels are zeros, [1, 1 + patches, D]; what stands for no picture."""
        config = self.model.config
        weight = self.model.visual_projection.weight
        return self._states(weight.new_zeros(1, config.num_channels, config.image_size, config.image_size))

    def _states(self, pixels: Tensor) -> Tensor:
        states: Tensor = self.model(pixels, output_hidden_states=True).hidden_states[-2]
        return states

    def _prepared(self, images: Tensor) -> Tensor:
        weight = self.model.visual_projection.weight
        return self.processor(images.to(weight.device, non_blocking=True)).to(weight.dtype)

    def save(self, folder: Path) -> None:
        """Write the folder that transformers opens as a CLIPVisionModelWithProjection; errors as in `save_model`."""
        config = self.model.config.to_hugging_face() | {"architectures": [type(self.model).__name__]}
        save_model(folder, self.model.state_dict(), config, TRANSFORMERS_WEIGHTS)
        write_json(folder / "preprocessor_config.json", self.processor.to_hugging_face())


def outline_image_encoder(folder: Path) -> CLIPVisionModelWithProjection:
    """The `outline_model` of the tower that `CLIPImageEncoder.load` reads."""
    return outline_model(CLIPVisionModelWithProjection, folder, vision_config_of, allow_extra=True)


def image_encoder_key(folder: Path) -> dict[str, str]:
    """What decides the results of an image encoder: its weights and configuration, and how pictures are prepared."""
    processor = image_processor_for(outline_image_encoder(folder).config.image_size, folder)
    return {IMAGE_ENCODER: model_sha256(folder), "the image processor": processor.model_dump_json()}


def vision_config_of(mapping: Mapping[str, Any]) -> CLIPVisionConfig:
    """The image tower's configuration in a config.json of its own or of a whole CLIP.

    Raises:
        ValueError: it is a ResNet.
    """
    if "vision_config" not in mapping:
        return CLIPVisionConfig.from_hugging_face(mapping)
    whole = CLIPConfig.from_hugging_face(mapping)
    if not isinstance(whole.vision_config, CLIPVisionConfig):
        raise ValueError("its image tower is a ResNet; expected a Vision Transformer")
    return whole.vision_config.model_copy(update={"projection_dim": whole.projection_dim})
