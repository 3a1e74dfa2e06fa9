"""CLIP's image tower with its projection and its image processor: pictures to embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm_cli.core.models.clip_config import CLIPConfig, CLIPVisionConfig
from ldm_cli.core.models.clip_image_processor import CLIPImageProcessor
from ldm_cli.core.models.clip_vision import CLIPVisionModelWithProjection
from ldm_cli.errors import CheckpointError
from ldm_cli.formats.json_file import write_json
from ldm_cli.formats.model_folder import load_model, outline_model, read_image_processor
from ldm_cli.formats.model_source import has_model_json
from ldm_cli.formats.pipeline_folder import FEATURE_EXTRACTOR, IMAGE_ENCODER, IMAGE_PROCESSOR
from ldm_cli.formats.save_model import save_model
from ldm_cli.formats.weight_files import TRANSFORMERS_WEIGHTS


class CLIPImageEncoder(nn.Module):
    """Pictures to embeddings in the joint space, which are not normalised."""

    def __init__(self, model: CLIPVisionModelWithProjection, processor: CLIPImageProcessor) -> None:
        super().__init__()
        self.model, self.processor = model, processor

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype = torch.float32) -> CLIPImageEncoder:
        """Read the folder of an image tower with projection or of a whole CLIP; errors as in `load_model`.

        Raises:
            CheckpointError: the image processor does not give images of the tower's size.
        """
        model = load_model(CLIPVisionModelWithProjection, folder, vision_config_of, allow_extra=True, dtype=dtype)
        size = model.config.image_size
        processor = read_image_processor(CLIPImageProcessor.from_hugging_face, processor_folder(folder))
        processor = CLIPImageProcessor.for_side(size) if processor is None else processor
        if processor.side != size:
            cause = f"its image processor does not give {size}x{size} px, which the tower's image_size asks for"
            raise CheckpointError(f"cannot use '{folder}'", cause, "correct preprocessor_config.json")
        return cls(model, processor)

    def save(self, folder: Path, processor: str = FEATURE_EXTRACTOR) -> None:
        """Write tower and image processor as components of a pipeline folder; errors as in `save_model`.

        Args:
            processor: subfolder of the image processor.
        """
        config = {**self.model.config.to_hugging_face(), "architectures": [type(self.model).__name__]}
        save_model(folder / IMAGE_ENCODER, self.model.state_dict(), config, TRANSFORMERS_WEIGHTS)
        (folder / processor).mkdir(parents=True, exist_ok=True)
        write_json(folder / processor / "preprocessor_config.json", self.processor.to_hugging_face())

    @property
    def width(self) -> int:
        """P, the size of an embedding."""
        return self.model.config.projection_dim

    def forward(self, images: Tensor) -> Tensor:
        """Images uint8 [B, 3, H, W] of any size, on the tower's device → [B, P]."""
        pixels = self.processor(images).to(self.model.visual_projection.weight.dtype)
        return self.model.project(self.model(pixels))


def outline_image_tower(folder: Path) -> CLIPVisionModelWithProjection:
    """The `outline_model` of the tower that `CLIPImageEncoder.load` reads."""
    return outline_model(CLIPVisionModelWithProjection, folder, vision_config_of, allow_extra=True)


def processor_folder(image_encoder: Path) -> Path:
    """Where the image processor of a tower lies: in its folder or, in pipelines, in a folder beside it."""
    for name in (FEATURE_EXTRACTOR, IMAGE_PROCESSOR):
        beside = image_encoder.parent / name
        if image_encoder.name == IMAGE_ENCODER and has_model_json(beside / "preprocessor_config.json"):
            return beside
    return image_encoder


def vision_config_of(mapping: Mapping[str, Any]) -> CLIPVisionConfig:
    """The image tower's configuration in a config.json of its own or of a whole CLIP.

    Raises:
        ValueError: the tower is a ResNet, which has no projection of its own.
    """
    if "vision_config" not in mapping:
        return CLIPVisionConfig.from_hugging_face(mapping)
    whole = CLIPConfig.from_hugging_face(mapping)
    if not isinstance(whole.vision_config, CLIPVisionConfig):
        raise ValueError("its image tower is a ResNet; only a Vision Transformer gives image embeddings here")
    return whole.vision_config.model_copy(update={"projection_dim": whole.projection_dim})
