"""Pictures as DINOv2 features, which follow people's judgement better than Inception's (Stein et al. 2023,
arXiv:2306.04675, section 4)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from ldm_cli.core.models.clip_image_processor import CLIPImageProcessor, HeightWidth, ShortestEdge
from ldm_cli.core.models.dinov2 import Dinov2Model
from ldm_cli.errors import DivergedError
from ldm_cli.families.family import place
from ldm_cli.formats.hub import recorded
from ldm_cli.formats.model_folder import load_model, outline_model, read_image_processor
from ldm_cli.formats.model_source import weights_sha256

# Of the published models: mean and deviation of ImageNet.
_PUBLISHED = CLIPImageProcessor(
    size=ShortestEdge(shortest_edge=256),
    crop_size=HeightWidth(height=224, width=224),
    image_mean=(0.485, 0.456, 0.406),
    image_std=(0.229, 0.224, 0.225),
)


def outline_dinov2(folder: Path) -> Dinov2Model:
    """The `outline_model` of a Dinov2Model folder."""
    return outline_model(Dinov2Model, folder)


class DINOv2Features:
    """Features of a Dinov2Model folder, prepared by its image processor, or where it has none by the published one.

    Attributes:
        provenance: `folder`, `sha256` of the tensors, `preprocessing`.

    Raises:
        CheckpointError and others: as `load_model` and `read_image_processor`.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._model, self._device = load_model(Dinov2Model, folder).eval(), device
        place(device, torch.float32, self._model)
        self._processor = read_image_processor(CLIPImageProcessor.from_hugging_face, folder) or _PUBLISHED
        self.provenance = {
            "folder": recorded(folder),
            "sha256": weights_sha256(folder),
            "preprocessing": json.dumps(self._processor.to_mapping()),
        }

    @torch.inference_mode()
    def __call__(self, images: Sequence[Tensor] | Tensor) -> Tensor:
        """Pictures uint8 [3, H, W], of any sizes → float32 [B, D] on the device.

        Raises:
            DivergedError: a feature is not finite.
        """
        groups = [torch.stack(list(group)) for _, group in groupby(images, lambda image: image.shape)]
        features: Tensor = self._model(torch.cat([self._processor(group.to(self._device)) for group in groups]))
        if not bool(features.isfinite().all()):
            raise DivergedError("DINOv2 features of pictures are not finite", remedy="give another model")
        return features
