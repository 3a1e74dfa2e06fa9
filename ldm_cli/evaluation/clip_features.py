"""Images and texts as CLIP embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_cli.core.cpu import tune_for_cpu
from ldm_cli.core.models.clip import CLIPModel, normalize_images
from ldm_cli.data.tokenizer import Tokenizer


class CLIPFeatures:
    """Embeddings of a CLIP model.

    Attributes:
        image_size: side to which images are resized, in pixels.
        num_truncated: number of texts so far that exceeded its context.
    """

    def __init__(self, model: CLIPModel, tokenizer: Tokenizer, device: torch.device) -> None:
        self._model, self._tokenizer, self._device = model.to(device).eval(), tokenizer, device
        tune_for_cpu(model)
        self.image_size = model.config.vision_config.image_size
        self.num_truncated = 0

    @torch.inference_mode()
    def images(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] to float32 [B, P] on the CPU; other sizes are resized, bicubic and
        anti-aliased."""
        pixels = images.to(self._device).float()
        if pixels.shape[2:] != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 255)
        return self._model.get_image_features(normalize_images(pixels)).float().cpu()

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """B texts to float32 [B, P] on the CPU; longer texts than the context are truncated."""
        tokens = self._tokenizer.encode(texts, self._model.config.text_config.max_position_embeddings)
        self.num_truncated += len(tokens.truncated)
        return self._model.get_text_features(tokens.input_ids.to(self._device)).float().cpu()
