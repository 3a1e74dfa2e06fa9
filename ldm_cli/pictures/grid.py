"""Pictures side by side, with or without words at the edges."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ldm_cli.errors import printable
from ldm_cli.pictures.images import from_pillow

_LINE_HEIGHT = 14
_CHARACTER_WIDTH = 6
_MOST_CHARACTERS = 300
_MOST_LINES = 6
_MISSING = 224


def image_grid(images: Sequence[Tensor], columns: int, gap: int = 2) -> Tensor:
    """Pictures side by side, row by row, on white.

    Args:
        images: uint8 [3, H, W] each, at least one; smaller ones lie at the top left of their cell.
        columns: pictures per row.
        gap: pixels between pictures.

    Returns:
        uint8 [3, H', W'].

    Raises:
        ValueError: no pictures.
    """
    if not images:
        raise ValueError(f"image_grid: images={images!r} is empty")
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    rows = -(-len(images) // columns)
    size = (3, rows * (height + gap) - gap, min(columns, len(images)) * (width + gap) - gap)
    grid = torch.full(size, 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        grid[:, top : top + image.shape[1], left : left + image.shape[2]] = image
    return grid


def placeholder(size: tuple[int, int]) -> Tensor:
    """A picture of height × width that is not drawn yet: light grey, uint8 [3, H, W]."""
    return torch.full((3, *size), _MISSING, dtype=torch.uint8)


def labelled_grid(
    images: Sequence[Tensor], columns: Sequence[str], rows: Sequence[str], title: str, gap: int = 2
) -> Tensor:
    """A table of pictures, one column per entry of `columns` and one row per entry of `rows`.

    Args:
        images: row by row, uint8 [3, H, W] each.
        columns: words above the columns.
        rows: words left of the rows.
        title: words above all.
        gap: pixels between pictures.

    Returns:
        uint8 [3, H', W'], H' and W' larger than those of `image_grid` by what the words take.
    """
    grid = image_grid(images, len(columns), gap)
    height, width = (max(image.shape[axis] for image in images) + gap for axis in (1, 2))
    column_words, row_words = [[_plain(label) for label in labels] for labels in (columns, rows)]
    left = max(_CHARACTER_WIDTH * len(word) + (4 if word else 0) for word in row_words)
    # A column of thumbnails may be narrower than its words: then each has a line of its own.
    num_lines = 1 if all(_CHARACTER_WIDTH * len(word) <= width for word in column_words) else len(columns)
    right = max(left + i * width + _CHARACTER_WIDTH * len(word) for i, word in enumerate(column_words))
    total_width = max(left + grid.shape[2], right)
    heading = textwrap.wrap(_plain(title), max(20, total_width // _CHARACTER_WIDTH))[:_MOST_LINES]
    top = _LINE_HEIGHT * (len(heading) + num_lines)

    canvas = Image.new("RGB", (max(total_width, 20 * _CHARACTER_WIDTH), top + grid.shape[1]), "white")
    words = [(0, i * _LINE_HEIGHT, line) for i, line in enumerate(heading)]
    words += [
        (left + i * width, _LINE_HEIGHT * (len(heading) + (i if num_lines > 1 else 0)), word)
        for i, word in enumerate(column_words)
    ]
    words += [(0, top + i * height, word) for i, word in enumerate(row_words)]
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default_imagefont()
    for x, y, text in words:
        draw.text((x, y + 1), text, "black", font)
    sheet = from_pillow(canvas).clone()
    sheet[:, top:, left : left + grid.shape[2]] = grid
    return sheet


def stacked(sheets: Sequence[Tensor], gap: int = 6) -> Tensor:
    """Sheets below one another on white, each uint8 [3, H, W]."""
    height, width = sum(s.shape[1] + gap for s in sheets) - gap, max(s.shape[2] for s in sheets)
    sheet, top = torch.full((3, height, width), 255, dtype=torch.uint8), 0
    for part in sheets:
        sheet[:, top : top + part.shape[1], : part.shape[2]] = part
        top += part.shape[1] + gap
    return sheet


def _plain(text: str) -> str:
    """What the built-in font has: other characters are escaped."""
    return printable(text).encode("ascii", "backslashreplace").decode()[:_MOST_CHARACTERS]
