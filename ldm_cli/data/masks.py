"""Masks beside pictures: how much each pixel counts in the loss of a denoiser."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ldm_cli.data.bad_samples import BadSampleError
from ldm_cli.data.config import DataConfig
from ldm_cli.data.decode import Picture, Place, decode_rgb, part_of
from ldm_cli.data.tables import is_picture

MASK_MEMBER = "mask.png"
"""The member that `pack` writes."""
_ENDINGS = (".mask.png", "-masklabel.png")
_FOLDER = "masks"


def decode_mask(
    data: bytes, picture: Picture, config: DataConfig, shape: tuple[int, int], place: Place, mirror: bool
) -> Tensor:
    """The mask of a picture, cut, resized (by area) and mirrored as `to_rectangle` does it to the picture.

    Args:
        data: a picture file; white counts, black and transparent pixels do not, grey ones in part.
        picture: decoded with `config` for this `shape`.
        shape: height and width of the result (H, W).
        place, mirror: as in `to_rectangle`.

    Returns:
        uint8 [1, H, W]: 255 counts in full.

    Raises:
        BadSampleError: "mask of another size", or as in `decode_rgb`.
    """
    mask = decode_rgb(data, (0, 0, 0), config.max_pixels)
    expect_size(mask.size, picture.size)
    height, width = shape
    # The picture may have been reduced while it was decoded: its parts are whole pixels of what is left.
    grey = mask.image.convert("L").resize(picture.image.size, Image.Resampling.BOX)
    box = (0, 0, *grey.size) if config.crop == "squash" else part_of(grey.size, width, height, place, config.crop)
    pixels = grey.resize((width, height), Image.Resampling.BOX, box).tobytes()
    result = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(1, height, width)
    return result.flip(-1) if mirror else result


def expect_size(mask: tuple[int, int], picture: tuple[int, int]) -> None:
    """Raise BadSampleError unless a mask has the height and width of its picture."""
    if mask != picture:
        sizes = [f"{width}×{height}" for height, width in (mask, picture)]
        raise BadSampleError("mask of another size", f"{sizes[0]} for a picture of {sizes[1]}")


class MaskFiles:
    """The masks of pictures in folders: `NAME.mask.png` or `NAME-masklabel.png` beside `NAME.jpg`, or `masks/NAME.png`.

    Each folder is listed once.
    """

    def __init__(self) -> None:
        self._listed: dict[Path, dict[str, Path]] = {}

    def of(self, picture: Path) -> Path | None:
        """The mask of a picture, whatever its capitals; None if there is none."""
        folder, stem = picture.parent, picture.stem
        places = [(folder, stem + ending) for ending in _ENDINGS] + [(folder / _FOLDER, f"{stem}.png")]
        found = (self._files(parent).get(name.lower()) for parent, name in places)
        return next((path for path in found if path is not None), None)

    def _files(self, folder: Path) -> dict[str, Path]:
        """The pictures in a folder, by their names in lower case."""
        if folder not in self._listed:
            paths = sorted(folder.iterdir()) if folder.is_dir() else []
            self._listed[folder] = {path.name.lower(): path for path in paths if is_picture(path)}
        return self._listed[folder]
