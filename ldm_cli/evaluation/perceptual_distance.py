"""LPIPS of pictures, with weights from a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ldm_cli.core.first_nonfinite import first_nonfinite
from ldm_cli.core.models.lpips import LPIPS, LPIPSBackbone
from ldm_cli.core.pixels import to_signed
from ldm_cli.errors import CheckpointError, DivergedError
from ldm_cli.families.family import place
from ldm_cli.formats.model_folder import check_tensors, without_weights
from ldm_cli.formats.weight_files import read_tensors, tensors_sha256
from ldm_cli.formats.weight_values import expect_sound

LPIPS_STEM = "features.0.weight"
"""Name of the first tensor of both classifiers."""


class PerceptualDistance:
    """LPIPS of a file's weights.

    Args:
        file: that `ldm convert --lpips-heads` wrote.

    Attributes:
        provenance: `file`, `sha256` of the tensors, `backbone`.

    Raises:
        CheckpointError: the file holds other weights; other errors as in `read_tensors`.
    """

    def __init__(self, file: Path, device: torch.device) -> None:
        tensors = lpips_tensors(read_tensors(file), file)
        self.backbone = _backbone(tensors, file)
        self._model, self._device = LPIPS(self.backbone), device
        self._model.load_state_dict(tensors)
        place(device, torch.float32, self._model)
        self.provenance = {"file": file.name, "sha256": tensors_sha256([file]), "backbone": self.backbone}

    @torch.inference_mode()
    def __call__(self, images: Tensor, originals: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] twice → float32 [B] on the device.

        Raises:
            DivergedError: a distance is not finite.
        """
        pair = to_signed(images, self._device), to_signed(originals, self._device)
        distances: Tensor = self._model(*pair)
        if not bool(distances.isfinite().all()):
            origin = first_nonfinite({"lpips": self._model}, lambda: self._model(*pair))
            raise DivergedError("LPIPS is not finite", f"the first such value is in {origin}", "give other weights")
        return distances


def lpips_tensors(tensors: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """The tensors of LPIPS in float32; what only the classifier needs is left out.

    Args:
        tensors: a classifier of torchvision, and the heads.
        source: where they were read, for errors.

    Raises:
        CheckpointError: they are not those of LPIPS, or not finite, or zeros.
    """
    with without_weights():
        expected = LPIPS(_backbone(tensors, source)).state_dict()
    found = {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier.")}
    check_tensors(expected, found, source)
    expect_sound(found, source)
    return {name: tensor.float() for name, tensor in found.items()}


def _backbone(tensors: Mapping[str, Tensor], source: Path) -> LPIPSBackbone:
    """AlexNet begins with kernels of 11 pixels, VGG-16 with kernels of 3."""
    side = tensors[LPIPS_STEM].shape[-1] if LPIPS_STEM in tensors else 0
    if side not in (3, 11):
        raise CheckpointError(f"'{source}' has no weights of LPIPS", "it is neither on AlexNet nor on VGG-16")
    return "alex" if side == 11 else "vgg"
