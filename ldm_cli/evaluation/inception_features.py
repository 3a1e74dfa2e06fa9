"""Pictures as Inception features, prepared as one of the known programs prepares them.

Distances of one pair of sets differ between the preparations. Name the preparation with every distance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm_cli.core.first_nonfinite import first_nonfinite
from ldm_cli.core.models.inception import INCEPTION_SIDE, InceptionV3, Tap
from ldm_cli.errors import CheckpointError, DivergedError
from ldm_cli.evaluation.config import HOW_TO_GET_INCEPTION, Preprocessing
from ldm_cli.families.family import place
from ldm_cli.formats.model_folder import check_tensors, without_weights
from ldm_cli.formats.weight_files import read_tensors, tensors_sha256
from ldm_cli.formats.weight_values import expect_sound


def prepared(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Pictures as the network's input.

    - `pytorch-fid`: bilinear without antialiasing, to [-1, 1].
    - `clean`: bicubic with antialiasing in float, cut to [0, 255], then (x − 128) / 128 (Parmar, Zhang, Zhu 2022,
      arXiv:2104.11222).
    - `torch-fidelity`: bilinear as in TensorFlow 1, where pixel i of the result lies at i · old size / new size; then
      (x − 128) / 128.

    Args:
        images: uint8 [B, 3, H, W].
        preprocessing: the program.

    Returns:
        float32 [B, 3, 299, 299].
    """
    pixels, size = images.float(), (INCEPTION_SIDE, INCEPTION_SIDE)
    if preprocessing == "pytorch-fid":
        return F.interpolate(pixels / 255, size, mode="bilinear", align_corners=False) * 2 - 1
    if preprocessing == "clean":
        # In float64, as Pillow sums: of large pictures float32 loses the last thousandths of a level.
        pixels = F.interpolate(pixels.double(), size, mode="bicubic", antialias=True).clamp(0, 255).float()
    else:
        pixels = _like_tensorflow(_like_tensorflow(pixels, -1), -2)
    return (pixels - 128) / 128


def _like_tensorflow(pixels: Tensor, dim: int) -> Tensor:
    """One axis resized to 299 by interpolation between the two pixels at i · old size / 299."""
    length = pixels.shape[dim]
    scale = torch.tensor(length / INCEPTION_SIDE, dtype=torch.float32)
    places = torch.arange(INCEPTION_SIDE, dtype=torch.float32) * scale
    low = places.long()
    weights = (places - low).to(pixels.device)
    low = low.to(pixels.device)
    left, right = pixels.index_select(dim, low), pixels.index_select(dim, (low + 1).clamp(max=length - 1))
    return left + (right - left) * (weights if dim == -1 else weights[:, None])


class InceptionFeatures:
    """Features of FID's Inception network.

    Attributes:
        provenance: `file`, `sha256` of the tensors, `preprocessing`.
    """

    def __init__(self, model: InceptionV3, device: torch.device, preprocessing: Preprocessing) -> None:
        place(device, torch.float32, model)
        self._model, self._device, self._preprocessing = model, device, preprocessing
        self.provenance: dict[str, str] = {"preprocessing": preprocessing}

    @classmethod
    def load(cls, file: Path, device: torch.device, preprocessing: Preprocessing) -> Self:
        """Read the weights from a safetensors file; errors as in `read_tensors`.

        Raises:
            CheckpointError: the file is a pickle, or no weights of this network.
        """
        try:
            tensors = inception_tensors(read_tensors(file), file)
        except CheckpointError as error:
            if "pickle" not in error.cause:
                raise
            raise CheckpointError(error.what, error.cause, HOW_TO_GET_INCEPTION) from error
        with without_weights():
            model = InceptionV3()
        model.load_state_dict(tensors, strict=False, assign=True)
        result = cls(model, device, preprocessing)
        result.provenance = {"file": file.name, "sha256": tensors_sha256([file]), **result.provenance}
        return result

    @torch.inference_mode()
    def __call__(self, images: Sequence[Tensor] | Tensor, taps: Sequence[Tap] = ("2048",)) -> dict[str, Tensor]:
        """Pictures uint8 [3, H, W], of any sizes → float32 [B, N] on the device for each tap.

        Raises:
            DivergedError: a feature is not finite, or zeros.
        """
        groups = [torch.stack(list(group)) for _, group in groupby(images, lambda image: image.shape)]
        pixels = torch.cat([prepared(group.to(self._device), self._preprocessing) for group in groups])
        found = self._model(pixels.contiguous(memory_format=torch.channels_last), taps)
        if not all(bool(features.isfinite().all()) for features in found.values()):
            origin = first_nonfinite({"inception": self._model}, lambda: self._model(pixels, taps))
            cause = f"the first such value is in {origin}"
            raise DivergedError("Inception features of pictures are not finite", cause, "give other weights")
        return dict(found)


def inception_tensors(tensors: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """The tensors of the network in float32, of all that a published file holds.

    Args:
        tensors: by the names of `pt_inception-2015-12-05-6726825d.pth`.
        source: where they were read, for errors.

    Raises:
        CheckpointError: they are not those of FID's network, or not finite, or zeros.
    """
    with without_weights():
        expected = InceptionV3().state_dict()
    # The number of batches that a normalisation was trained on is not used, and some files lack it.
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith(".num_batches_tracked")}
    check_tensors(expected, found, source)
    expect_sound(found, source)
    return {name: tensor.float() for name, tensor in found.items()}
