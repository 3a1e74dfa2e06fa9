"""Pictures on disk: PNG files with safe, sortable names, grids, and what it takes to draw them again."""

from __future__ import annotations

import ctypes
import json
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from ldm_cli.errors import StorageError
from ldm_cli.formats.json_file import discard

_SLUG_LENGTH = 40


def slug(text: str) -> str:
    """Text as a part of a file name: a-z, 0-9 and single hyphens, at most 40 characters.

    >>> slug("A small RED circle / é")
    'a-small-red-circle-e'
    """
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain)[:_SLUG_LENGTH].strip("-") or "image"


def image_grid(images: Sequence[Tensor], columns: int, gap: int = 2) -> Tensor:
    """Pictures of one size side by side, row by row, on white.

    Args:
        images: uint8 [3, H, W] each, at least one.
        columns: pictures per row.
        gap: pixels between pictures.

    Returns:
        uint8 [3, H', W'].

    Raises:
        ValueError: no pictures.
    """
    if not images:
        raise ValueError(f"image_grid: images={images!r} is empty")
    height, width = images[0].shape[-2:]
    rows = -(-len(images) // columns)
    size = (3, rows * (height + gap) - gap, min(columns, len(images)) * (width + gap) - gap)
    grid = torch.full(size, 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        grid[:, top : top + height, left : left + width] = image
    return grid


def save_png(path: Path, pixels: Tensor, text: Mapping[str, str] | None = None) -> None:
    """Write a picture; the file appears under its name only when it is whole. Folders are created.

    Args:
        path: the file.
        pixels: uint8 [3, H, W].
        text: PNG text chunks, by keyword.

    Raises:
        StorageError: writing failed.
    """
    chunks = PngImagePlugin.PngInfo()
    for keyword, value in (text or {}).items():
        chunks.add_itxt(keyword, value)
    temporary = path.with_name(f".tmp-{path.name}")
    image = _to_pillow(pixels)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            image.save(stream, format="PNG", pnginfo=chunks)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        discard(temporary)
        raise StorageError(f"cannot write '{path}'", error.strerror or str(error)) from error


def read_png(path: Path) -> Tensor:
    """The pixels of a picture that `save_png` wrote, uint8 [3, H, W].

    Raises:
        OSError: it cannot be read.
    """
    with Image.open(path) as image:
        data, (width, height) = bytearray(image.convert("RGB").tobytes()), image.size
    return torch.frombuffer(data, dtype=torch.uint8).reshape(height, width, 3).permute(2, 0, 1)


def _to_pillow(pixels: Tensor) -> Image.Image:
    _, height, width = pixels.shape
    interleaved = pixels.permute(1, 2, 0).contiguous()
    data = ctypes.string_at(interleaved.data_ptr(), interleaved.numel())
    return Image.frombytes("RGB", (width, height), data)


_A1111_SAMPLERS = {
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "dpm2": "DPM2",
    "lms": "LMS",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_2s_ancestral": "DPM++ 2S a",
    "dpmpp_sde": "DPM++ SDE",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "unipc": "UniPC",
    "pndm": "PLMS",
    "flow_euler": "Euler",
    "flow_heun": "Heun",
    "lcm": "LCM",
}


def automatic1111_parameters(image: Mapping[str, Any], job: Mapping[str, Any], size: tuple[int, int]) -> str:
    """The text that AUTOMATIC1111's web UI, and all that read its pictures, keep under `parameters`.

    Args:
        image: `prompt` and `seed`.
        job: `sampling` and `weights`, as in images.json.
        size: width and height in pixels.
    """
    sampling = job["sampling"]
    fields = {
        "Steps": sampling["steps"],
        "Sampler": _A1111_SAMPLERS[sampling["sampler"]],
        "CFG scale": sampling["guidance"]["scale"],
        "Seed": image["seed"],
        "Size": f"{size[0]}x{size[1]}",
        "Model hash": job["weights"].get("unet", "")[:10] or None,
    }
    last = ", ".join(f"{name}: {value}" for name, value in fields.items() if value is not None)
    negative = f"\nNegative prompt: {sampling['negative']}" if sampling["negative"] else ""
    return f"{image['prompt']}{negative}\n{last}"


def text_chunks(image: Mapping[str, Any], job: Mapping[str, Any], size: tuple[int, int]) -> dict[str, str]:
    """What a picture says of itself: `parameters` for other programs, `ldm_cli` with everything, as JSON."""
    return {
        "parameters": automatic1111_parameters(image, job, size),
        "ldm_cli": json.dumps({"image": image, "job": job}, ensure_ascii=False, sort_keys=True),
    }
