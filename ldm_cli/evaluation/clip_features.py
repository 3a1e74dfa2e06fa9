"""Images and texts as CLIP embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from ldm_cli.core.cpu import tune_for_cpu
from ldm_cli.core.first_nonfinite import first_nonfinite
from ldm_cli.core.models.clip import CLIPModel
from ldm_cli.core.models.clip_image_processor import CLIPImageProcessor
from ldm_cli.data.tokenizer import Tokenizer
from ldm_cli.errors import DivergedError
from ldm_cli.families.clip_folder import open_clip


class CLIPFeatures:
    """Embeddings of a CLIP model.

    Attributes:
        processor: how images are prepared.
        logit_scale: by which cosines are multiplied before a softmax.
        num_truncated: number of texts so far that exceeded its context.
    """

    def __init__(
        self, model: CLIPModel, tokenizer: Tokenizer, processor: CLIPImageProcessor, device: torch.device
    ) -> None:
        self._model, self._device = model.to(device).eval(), device
        self._tokenizer, self.processor = tokenizer, processor
        self.logit_scale = float(model.clamped_logit_scale.detach())
        tune_for_cpu(model)
        self.num_truncated = 0

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> Self:
        """Read a CLIP folder; errors as in `open_clip`."""
        return cls(*open_clip(folder), device)

    @torch.inference_mode()
    def images(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] → float32 [B, P] on the CPU, prepared as the image processor says.

        Raises:
            DivergedError: a feature is not finite.
        """
        return self._finite("images", lambda: self._model.get_image_features(self.processor(images.to(self._device))))

    @torch.inference_mode()
    def pictures(self, pictures: Sequence[Tensor]) -> Tensor:
        """B pictures uint8 [3, H, W], of any sizes → float32 [B, P] on the CPU, prepared whole; else as `images`."""
        groups = [torch.stack(list(group)) for _, group in groupby(pictures, lambda picture: picture.shape)]
        pixels = torch.cat([self.processor(group.to(self._device)) for group in groups])
        return self._finite("pictures", lambda: self._model.get_image_features(pixels))

    def squares(self, images: Sequence[Tensor]) -> Tensor:
        """Pictures uint8 [3, H, W], of any sizes, cut to their central squares first; else as `images`."""
        squares = [_central_square(image) for image in images]
        groups = [torch.stack(list(group)) for _, group in groupby(squares, lambda image: image.shape)]
        return torch.cat([self.images(group) for group in groups])

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """B texts → float32 [B, P] on the CPU; longer texts than the context are truncated. Raises as `images`."""
        tokens = self._tokenizer.encode(texts, self._model.config.text_config.max_position_embeddings)
        self.num_truncated += len(tokens.truncated)
        return self._finite("texts", lambda: self._model.get_text_features(tokens.input_ids.to(self._device)))

    def _finite(self, of_what: str, compute: Callable[[], Tensor]) -> Tensor:
        """The features float32 [B, P] on the CPU.

        Raises:
            DivergedError: one is not finite.
        """
        features = compute().float().cpu()
        # A length beyond float32 would make every cosine 0.
        if not bool(torch.linalg.vector_norm(features, dim=-1).isfinite().all()):
            origin = first_nonfinite({"clip": self._model}, compute) or "the length of its vectors"
            what, cause = f"the CLIP's features of {of_what} are not finite", f"the first such value is in {origin}"
            raise DivergedError(what, cause, "give another CLIP")
        return features


def _central_square(image: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[:, top : top + side, left : left + side]
