"""Anti-aliased drawing of one flat shape."""

from __future__ import annotations

import math

from PIL import Image, ImageDraw

from ldm_cli.data.scene_vocabulary import MAX_EXTENT, SHAPES, Color

_SUPERSAMPLING = 8


def coverage(shape: str, center: tuple[float, float], radius: float, size: int) -> tuple[Image.Image, tuple[int, int]]:
    """How much of each pixel a shape covers.

    Args:
        shape: one of `SHAPES`.
        center: x and y, in image sides.
        radius: in image sides.
        size: side of the square image in pixels.

    Returns:
        An 8-bit grey image of the part of the picture around the shape (255: covered), and the place of its upper left
        corner in the picture, in pixels.
    """
    fine = _SUPERSAMPLING * size
    left, top = (math.floor((c - MAX_EXTENT * radius) * size) - 1 for c in center)
    side = math.ceil(2 * MAX_EXTENT * radius * size) + 3
    mask = Image.new("L", (side * _SUPERSAMPLING, side * _SUPERSAMPLING))
    draw = ImageDraw.Draw(mask)
    # PIL's polygon joins pixel centres: without the half pixel, the outline would be off the geometry.
    x0 = center[0] * fine - left * _SUPERSAMPLING - 0.5
    y0 = center[1] * fine - top * _SUPERSAMPLING - 0.5
    for ink, outline in zip((255, 0), SHAPES[shape], strict=False):
        draw.polygon([(x0 + x * radius * fine, y0 + y * radius * fine) for x, y in outline], fill=ink)
    return mask.reduce(_SUPERSAMPLING), (left, top)


def paint(
    image: Image.Image, shape: str, color: Color, center: tuple[float, float], radius: float
) -> tuple[float, float, float, float]:
    """Paint a shape onto a square RGB image, in place.

    Returns:
        The outline's bounding box (left, top, right, bottom), in image sides.
    """
    mask, corner = coverage(shape, center, radius, image.width)
    image.paste(color, (*corner, corner[0] + mask.width, corner[1] + mask.height), mask)
    xs, ys = [x for x, _ in SHAPES[shape][0]], [y for _, y in SHAPES[shape][0]]
    return (
        center[0] + radius * min(xs),
        center[1] + radius * min(ys),
        center[0] + radius * max(xs),
        center[1] + radius * max(ys),
    )
