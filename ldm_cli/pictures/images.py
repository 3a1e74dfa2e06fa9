"""Picture files: PNG, JPEG, WebP and animations, written whole, with safe and sortable names."""

from __future__ import annotations

import ctypes
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ldm_cli.data.decode import from_pillow
from ldm_cli.formats.png_metadata import exif, png_chunks
from ldm_cli.inputs import open_input
from ldm_cli.storage import storage_errors, whole_file

_SLUG_LENGTH = 40
_QUALITY: dict[str, dict[str, Any]] = {
    ".png": {"format": "PNG"},
    ".jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    ".webp": {"format": "WEBP", "quality": 95, "method": 4},
}


def slug(text: str) -> str:
    """Text as a part of a file name: a-z, 0-9 and single hyphens, at most 40 characters.

    >>> slug("A small RED circle / é")
    'a-small-red-circle-e'
    """
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain)[:_SLUG_LENGTH].strip("-") or "image"


def save_image(path: Path, pixels: Tensor, texts: Mapping[str, str] | None = None) -> None:
    """Write a picture; the file appears under its name only when it is complete. Folders are created.

    Args:
        path: ends with `.png`, `.jpg` or `.webp`, which decides the format.
        pixels: uint8 [3, H, W].
        texts: metadata by keyword (see formats.png_metadata).

    Raises:
        OutputError, StorageError: writing failed.
        ValueError: another ending.
    """
    if path.suffix not in _QUALITY:
        raise ValueError(f"save_image: '{path.name}' ends with none of {', '.join(_QUALITY)}")
    extra: dict[str, Any] = {}
    if texts:
        extra = {"pnginfo": png_chunks(texts)} if path.suffix == ".png" else {"exif": exif(texts)}
    image = to_pillow(pixels)
    _make_folder(path.parent)
    with whole_file(path) as temporary:
        image.save(temporary, **_QUALITY[path.suffix], **extra)


def save_animation(path: Path, frames: Sequence[Tensor], milliseconds: int) -> None:
    """Write pictures as an endlessly repeating lossless WebP animation.

    Args:
        frames: uint8 [3, H, W] each.
        milliseconds: duration of each frame.

    Raises:
        OutputError, StorageError: writing failed.
    """
    first, *others = [to_pillow(frame) for frame in frames]
    options: dict[str, Any] = {"save_all": True, "append_images": others, "duration": milliseconds, "loop": 0}
    with whole_file(path) as temporary:
        first.save(temporary, format="WEBP", lossless=True, **options)


def read_image(path: Path) -> Tensor:
    """The pixels of a picture that `save_image` wrote, uint8 [3, H, W].

    Raises:
        OSError: it cannot be read.
    """
    with open_input(path) as file, Image.open(file) as image:
        return from_pillow(image.convert("RGB"))[0]


def to_pillow(pixels: Tensor) -> Image.Image:
    """uint8 [3, H, W] → an RGB picture."""
    _, height, width = pixels.shape
    interleaved = pixels.permute(1, 2, 0).contiguous()
    data = ctypes.string_at(interleaved.data_ptr(), interleaved.numel())
    return Image.frombytes("RGB", (width, height), data)


def _make_folder(folder: Path) -> None:
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
