"""Figures of dots, lines and arrows, drawn twice from one description: as a PNG by Pillow, and as SVG for the page.

Colours are names; the PNG is drawn in the light ones, and the page's style sheet has both the light and the dark ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

COLOURS = {
    "paper": ("#fffdf8", "#12151c"),
    "panel": ("#f6f2e9", "#1a1f29"),
    "ink": ("#1f2430", "#eceae4"),
    "muted": ("#7b7e87", "#9aa0ad"),
    "data": ("#c9c2b2", "#4a5264"),
    "arrow": ("#2f4b7c", "#8fb4ff"),
    "arm0": ("#e4572e", "#ff7a52"),
    "arm1": ("#e08a1e", "#ffad42"),
    "arm2": ("#c2a51b", "#f0d04a"),
    "arm3": ("#4f9d56", "#74d07c"),
    "arm4": ("#17828f", "#3fc3d2"),
    "arm5": ("#5a4fb0", "#9d92ff"),
}
"""Colour by name: light, dark. `arm0` … `arm5` lead along the spiral, from the inner end to the outer."""

PANEL_SIZE = 300
"""Width of a panel in the units of the drawing; its height follows from what it shows."""
_GAP, _TITLE, _MARGIN = 16, 30, 8
_PNG_SCALE, _SMOOTHING = 2, 2


@dataclass(frozen=True)
class Dots:
    """Points [N, 2] as discs of this radius, in units of the drawing."""

    xy: Tensor
    colour: str
    radius: float = 2.0
    opacity: float = 0.85


@dataclass(frozen=True)
class Line:
    """A polyline through [N, 2]."""

    xy: Tensor
    colour: str
    width: float = 1.2
    opacity: float = 1.0


@dataclass(frozen=True)
class Arrows:
    """Arrows from [N, 2] to [N, 2], each with an opacity [N] of its own."""

    start: Tensor
    end: Tensor
    opacity: Tensor
    colour: str = "arrow"


@dataclass(frozen=True)
class Text:
    """Text at a point; `anchor` is the side of the point it begins at: `l`, `m` or `r`."""

    x: float
    y: float
    text: str
    colour: str = "ink"
    anchor: str = "l"


Mark = Dots | Line | Arrows | Text


@dataclass(frozen=True)
class Panel:
    """One picture: marks in the rectangle x0 … x1, y0 … y1 of the data; y points up."""

    title: str
    marks: Sequence[Mark]
    view: tuple[float, float, float, float] = (-2.6, 2.6, -2.6, 2.6)
    aspect: float = 1.0
    """Width by height."""
    columns: int = 1
    """How many panels wide it is."""


@dataclass(frozen=True)
class Figure:
    """Panels in rows of `columns`."""

    name: str
    panels: Sequence[Panel]
    columns: int


@dataclass(frozen=True)
class _Place:
    """A panel's rectangle in the drawing, and the way from data to it."""

    panel: Panel
    left: float
    top: float
    width: float
    height: float

    def points(self, xy: Tensor, scale: float = 1.0) -> list[tuple[float, float]]:
        x0, x1, y0, y1 = self.panel.view
        x = self.left + (xy[:, 0].double() - x0) / (x1 - x0) * self.width
        y = self.top + (y1 - xy[:, 1].double()) / (y1 - y0) * self.height
        return list(zip((x * scale).tolist(), (y * scale).tolist(), strict=True))

    def inside(self, xy: Tensor) -> Tensor:
        x0, x1, y0, y1 = self.panel.view
        return xy[(xy[:, 0] > x0) & (xy[:, 0] < x1) & (xy[:, 1] > y0) & (xy[:, 1] < y1)]


def _layout(figure: Figure) -> tuple[list[_Place], float, float]:
    """Where the panels go, and the size of the whole."""
    places, column, top, row_height = [], 0, float(_MARGIN), 0.0
    for panel in figure.panels:
        if column + panel.columns > figure.columns:
            column, top = 0, top + row_height + _GAP
            row_height = 0.0
        width = panel.columns * PANEL_SIZE + (panel.columns - 1) * _GAP
        height = width / panel.aspect
        places.append(_Place(panel, _MARGIN + column * (PANEL_SIZE + _GAP), top + _TITLE, width, height))
        column, row_height = column + panel.columns, max(row_height, height + _TITLE)
    total = 2 * _MARGIN + figure.columns * PANEL_SIZE + (figure.columns - 1) * _GAP
    return places, total, top + row_height + _MARGIN


def save_png(figure: Figure, path: Path) -> None:
    """Draw a figure by Pillow, at twice its size and smoothed.

    Raises:
        OSError: writing failed.
    """
    places, width, height = _layout(figure)
    scale = _PNG_SCALE * _SMOOTHING
    image = Image.new("RGB", (round(width * scale), round(height * scale)), _light("paper"))
    for place in places:
        _paint(image, place, scale)
    image = image.resize((round(width * _PNG_SCALE), round(height * _PNG_SCALE)), Image.Resampling.BOX)
    image.quantize(128, dither=Image.Dither.NONE).save(path, "PNG", optimize=True)


def _light(name: str) -> tuple[int, int, int]:
    text = COLOURS[name][0]
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)


def _paint(image: Image.Image, place: _Place, scale: int) -> None:
    """Draw a panel and its title; what leads out of the panel is cut off at its edge."""
    left, top, width, height = (round(s * scale) for s in (place.left, place.top, place.width, place.height))
    ImageDraw.Draw(image).text(
        (left, top - 9 * scale), place.panel.title, _light("ink"), _font(16 * scale), anchor="ls"
    )
    drawn, shape = Image.new("RGB", (width, height), _light("panel")), Image.new("L", (width, height))
    # Opacity: "RGBA" as the drawing mode blends what is drawn with what is there.
    draw, at_origin = ImageDraw.Draw(drawn, "RGBA"), replace(place, left=0.0, top=0.0)
    for mark in place.panel.marks:
        _paint_mark(draw, at_origin, mark, scale)
    ImageDraw.Draw(shape).rounded_rectangle((0, 0, width - 1, height - 1), 8 * scale, fill=255)
    image.paste(drawn, (left, top), shape)


def _paint_mark(draw: ImageDraw.ImageDraw, place: _Place, mark: Mark, scale: int) -> None:
    if isinstance(mark, Text):
        ((x, y),) = place.points(_pair(mark.x, mark.y), scale)
        draw.text((x, y), mark.text, _light(mark.colour), _font(13 * scale), anchor=mark.anchor + "m")
    elif isinstance(mark, Dots):
        fill, r = (*_light(mark.colour), round(255 * mark.opacity)), mark.radius * scale
        for x, y in place.points(place.inside(mark.xy), scale):
            draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif isinstance(mark, Line):
        fill = (*_light(mark.colour), round(255 * mark.opacity))
        draw.line(place.points(mark.xy, scale), fill=fill, width=round(mark.width * scale), joint="curve")
    else:
        for shaft, head, opacity in _arrow_shapes(place, mark, scale):
            fill = (*_light(mark.colour), round(255 * opacity))
            draw.line(shaft, fill=fill, width=round(1.3 * scale))
            draw.polygon(head, fill=fill)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _pair(x: float, y: float) -> Tensor:
    return Tensor([[x, y]])


Point = tuple[float, float]


def _arrow_shapes(place: _Place, mark: Arrows, scale: float) -> list[tuple[list[Point], list[Point], float]]:
    """Shaft, head and opacity of every arrow; what cannot be seen is left out."""
    shapes = []
    starts, ends = place.points(mark.start, scale), place.points(mark.end, scale)
    for (x0, y0), (x1, y1), opacity in zip(starts, ends, mark.opacity.tolist(), strict=True):
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        if length < 0.5 * scale or opacity < 0.03:
            continue
        ux, uy = (x1 - x0) / length, (y1 - y0) / length
        head = min(5.0 * scale, 0.6 * length)
        bx, by, w = x1 - head * ux, y1 - head * uy, 0.45 * head
        shapes.append(
            ([(x0, y0), (bx, by)], [(x1, y1), (bx - w * uy, by + w * ux), (bx + w * uy, by - w * ux)], opacity)
        )
    return shapes


def svg(panel: Panel, name: str) -> str:
    """One panel as an SVG element, its colours as variables of the page (`var(--ink)`).

    Args:
        panel: what to draw.
        name: unique on the page, of letters, digits and hyphens.
    """
    width = panel.columns * PANEL_SIZE + (panel.columns - 1) * _GAP
    place = _Place(panel, 0.0, float(_TITLE), width, width / panel.aspect)
    return (
        f'<svg viewBox="0 0 {width:g} {place.top + place.height:g}" role="img" aria-label="{_escape(panel.title)}">'
        f"{_svg_panel(place, name)}</svg>"
    )


def _svg_panel(place: _Place, clip: str) -> str:
    left, top, width, height = place.left, place.top, place.width, place.height
    rectangle = f'<rect x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}" rx="8"'
    parts = [
        f'<text x="{left:g}" y="{top - 9:g}" class="title">{_escape(place.panel.title)}</text>',
        f'{rectangle} fill="var(--panel)"/><clipPath id="{clip}">{rectangle}/></clipPath><g clip-path="url(#{clip})">',
    ]
    for mark in place.panel.marks:
        if isinstance(mark, Text):
            ((x, y),) = place.points(_pair(mark.x, mark.y))
            anchor = {"l": "start", "m": "middle", "r": "end"}[mark.anchor]
            parts.append(
                f'<text x="{x:.1f}" y="{y + 4:.1f}" class="label" text-anchor="{anchor}" fill="var(--{mark.colour})">'
                f"{_escape(mark.text)}</text>"
            )
        elif isinstance(mark, Dots):
            # A stroke of no length with round ends is a disc; one path holds all of one colour.
            path = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in place.points(place.inside(mark.xy)))
            parts.append(_stroke(path, mark.colour, 2 * mark.radius, mark.opacity))
        elif isinstance(mark, Line):
            path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in place.points(mark.xy))
            parts.append(_stroke(path, mark.colour, mark.width, mark.opacity))
        else:
            for shaft, head, opacity in _arrow_shapes(place, mark, 1.0):
                (x0, y0), (x1, y1) = shaft
                tip = "L".join(f"{x:.1f} {y:.1f}" for x, y in head)
                parts.append(
                    f'<path d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}M{tip}Z" class="arrow" opacity="{opacity:.2f}"/>'
                )
    return "".join(parts) + "</g>"


def _stroke(path: str, colour: str, width: float, opacity: float) -> str:
    return f'<path d="{path}" stroke="var(--{colour})" stroke-width="{width:g}" opacity="{opacity:g}"/>'


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
