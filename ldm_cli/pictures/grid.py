"""Pictures side by side, with or without labels at the edges."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ldm_cli.data.decode import from_pillow
from ldm_cli.errors import printable

_SMALLEST_CELL = 128
_SMALLEST_FONT = 14
_ROW_LABEL_CHARACTERS = 24
_MOST_CHARACTERS = 300
_MOST_LINES = 6
_MISSING = 224
_GAP, _SHEET_GAP = 4, 12


def image_grid(images: Sequence[Tensor], columns: int | None = None) -> Tensor:
    """Pictures side by side, row by row, on white.

    Pictures with a side below 128 px are enlarged, all by the same whole factor.

    Args:
        images: uint8 [3, H, W] each, at least one; smaller ones lie at the top left of their cell.
        columns: pictures per row; None makes the grid nearly square.

    Returns:
        uint8 [3, H', W'].

    Raises:
        ValueError: no pictures.
    """
    if not images:
        raise ValueError(f"image_grid: images={images!r} is empty")
    images = _enlarged(images)
    columns = columns or math.ceil(math.sqrt(len(images)))
    height, width = _cell(images)
    rows = -(-len(images) // columns)
    size = (3, rows * (height + _GAP) - _GAP, min(columns, len(images)) * (width + _GAP) - _GAP)
    grid = torch.full(size, 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + _GAP), i % columns * (width + _GAP)
        grid[:, top : top + image.shape[1], left : left + image.shape[2]] = image
    return grid


def placeholder(size: tuple[int, int]) -> Tensor:
    """A light grey picture of height × width in place of a missing one, uint8 [3, H, W]."""
    return torch.full((3, *size), _MISSING, dtype=torch.uint8)


def labelled_grid(
    images: Sequence[Tensor],
    columns: Sequence[str],
    rows: Sequence[str],
    names: tuple[str, str] = ("", ""),
    title: str = "",
) -> Tensor:
    """A table of pictures with labels above its columns and left of its rows.

    Args:
        images: row by row, uint8 [3, H, W] each.
        columns: a label per column; if all are empty, the axes are not named either.
        rows: a label per row.
        names: of the horizontal and the vertical axis.
        title: the text above the table.

    Returns:
        uint8 [3, H', W'].
    """
    images = _enlarged(images)
    grid = image_grid(images, len(columns))
    height, width = (size + _GAP for size in _cell(images))
    font_size = max(_SMALLEST_FONT, min(height, width) // 20)
    font, line_height, character_width = ImageFont.load_default(font_size), font_size * 4 // 3, font_size * 0.6
    column_labels = [_wrapped(label, width / character_width) for label in columns]
    row_labels = [_wrapped(label, _ROW_LABEL_CHARACTERS) for label in rows]
    left = max(_text_width(font, text) for text in (*row_labels, names[1]))
    heading = _wrapped(title, (left + grid.shape[2]) / character_width)
    top = line_height * _num_lines(heading)
    # Position, anchor, colour, text.
    texts = [(0.0, 0.0, "la", "black", heading)]
    if any(columns):
        texts += [(left + grid.shape[2] / 2, top, "ma", "gray", names[0])]
        top += line_height * (1 + max(map(_num_lines, column_labels)))
        texts += [(0.0, top, "ld", "gray", names[1])]
        texts += [(left + (i + 0.5) * width, top, "md", "black", label) for i, label in enumerate(column_labels)]
    top += font_size // 4
    texts += [(0.0, top + (i + 0.5) * height, "lm", "black", label) for i, label in enumerate(row_labels)]
    sheet = Image.new("RGB", (left + grid.shape[2], top + grid.shape[1]), "white")
    draw = ImageDraw.Draw(sheet)
    for x, y, anchor, colour, text in texts:
        draw.multiline_text((x, y), text, colour, font, anchor, align="center" if anchor[0] == "m" else "left")
    pixels = from_pillow(sheet)[0]
    pixels[:, top:, left:] = grid
    return pixels


def stacked(sheets: Sequence[Tensor]) -> Tensor:
    """Sheets below one another on white, each uint8 [3, H, W]."""
    height, width = sum(s.shape[1] + _SHEET_GAP for s in sheets) - _SHEET_GAP, max(s.shape[2] for s in sheets)
    sheet, top = torch.full((3, height, width), 255, dtype=torch.uint8), 0
    for part in sheets:
        sheet[:, top : top + part.shape[1], : part.shape[2]] = part
        top += part.shape[1] + _SHEET_GAP
    return sheet


def _cell(images: Sequence[Tensor]) -> tuple[int, int]:
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    return height, width


def _enlarged(images: Sequence[Tensor]) -> list[Tensor]:
    factor = -(-_SMALLEST_CELL // min(_cell(images)))
    return [
        image.repeat_interleave(factor, 1).repeat_interleave(factor, 2) if factor > 1 else image for image in images
    ]


def _wrapped(text: str, characters: float) -> str:
    return "\n".join(textwrap.wrap(_plain(text), max(8, int(characters)), max_lines=_MOST_LINES, placeholder=" ..."))


def _num_lines(text: str) -> int:
    return text.count("\n") + 1 if text else 0


def _text_width(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, text: str) -> int:
    """Pixels of the longest line and a margin, 0 without text."""
    return math.ceil(max(font.getlength(line) for line in text.split("\n"))) + 8 if text else 0


def _plain(text: str) -> str:
    """The text in characters that the built-in font has; others are escaped."""
    return printable(text).encode("ascii", "backslashreplace").decode()[:_MOST_CHARACTERS]
