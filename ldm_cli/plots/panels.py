"""Panels of a figure, rendered by matplotlib: side by side as a PNG, or each one as SVG for the page.

Colours have names. A PNG uses the light ones; the page's style sheet has the light and the dark ones.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

LIGHT = {
    "paper": "#fffdf8",
    "panel": "#f6f2e9",
    "ink": "#1f2430",
    "muted": "#7b7e87",
    "data": "#c9c2b2",
    "arrow": "#2f4b7c",
    "arm0": "#e4572e",
    "arm1": "#e08a1e",
    "arm2": "#c2a51b",
    "arm3": "#4f9d56",
    "arm4": "#17828f",
    "arm5": "#5a4fb0",
}
"""Colour by name. `arm0` … `arm5` lead along the spiral, from the inner end to the outer."""
DARK = {
    "paper": "#12151c",
    "panel": "#1a1f29",
    "ink": "#eceae4",
    "muted": "#9aa0ad",
    "data": "#4a5264",
    "arrow": "#8fb4ff",
    "arm0": "#ff7a52",
    "arm1": "#ffad42",
    "arm2": "#f0d04a",
    "arm3": "#74d07c",
    "arm4": "#3fc3d2",
    "arm5": "#9d92ff",
}

_UNITS_PER_INCH = 72
PNG_DPI = 2 * _UNITS_PER_INCH
"""Dots per inch of a PNG: two pixels per point."""
_GAP, _TITLE_HEIGHT, _MARGIN = 16.0, 30.0, 8.0
# No random identifiers, text that takes the page's fonts, and every point of a path.
_SETTINGS: Any = {"svg.hashsalt": "ldm spiral", "svg.fonttype": "none", "path.simplify": False}
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
"""For an SVG that is the same whenever it is made."""


@dataclass(frozen=True)
class Panel:
    """One picture of a figure.

    Attributes:
        title: the line above it.
        draw: draws it on axes that fill the panel.
        size: width and height, in points.
    """

    title: str
    draw: Callable[[Axes], None]
    size: tuple[float, float] = (300.0, 300.0)


def dots(axes: Axes, xy: Tensor, colour: str, radius: float, opacity: float) -> None:
    """Draw points [N, 2] as discs; the radius is in points."""
    # A short stroke with round ends is a disc. All strokes are one path, so that the SVG stays small.
    start, gap = xy.double(), float("nan")
    x = [value for place in start[:, 0].tolist() for value in (place, place + 1e-3, gap)]
    y = [value for place in start[:, 1].tolist() for value in (place, place, gap)]
    axes.plot(x, y, color=LIGHT[colour], linewidth=2 * radius, alpha=opacity, solid_capstyle="round", snap=False)


def line(axes: Axes, xy: Tensor, colour: str, width: float, opacity: float = 1.0, label: str = "") -> None:
    """Draw a polyline through [N, 2]; the width is in points, and a label appears in the legend."""
    x, y = xy.double().T.tolist()
    axes.plot(x, y, color=LIGHT[colour], linewidth=width, alpha=opacity, label=label or None)


def save_png(panels: Sequence[Panel], columns: int, path: Path) -> None:
    """Draw panels of one size in rows, with their titles.

    Raises:
        OSError: writing failed.
    """
    width, height = panels[0].size
    rows = -(-len(panels) // columns)
    total_width = 2 * _MARGIN + columns * (width + _GAP) - _GAP
    total_height = 2 * _MARGIN + rows * (height + _TITLE_HEIGHT + _GAP) - _GAP
    pixels = io.BytesIO()
    with fixed_style():
        figure = _figure(total_width, total_height, LIGHT["paper"])
        for i, panel in enumerate(panels):
            left = _MARGIN + i % columns * (width + _GAP)
            top = _MARGIN + i // columns * (height + _TITLE_HEIGHT + _GAP) + _TITLE_HEIGHT
            below = total_height - top - height
            axes = _axes(figure, (left / total_width, below / total_height, width / total_width, height / total_height))
            axes.set_title(panel.title, loc="left", color=LIGHT["ink"], fontsize=15)
            panel.draw(axes)
        figure.savefig(pixels, format="png")
    with Image.open(pixels) as image:
        image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, "PNG", optimize=True)


def svg(panel: Panel, name: str) -> str:
    """One panel as an SVG element without its title; its colours are variables of the page, such as `var(--ink)`.

    Args:
        name: unique on the page, of letters, digits and hyphens.
    """
    text = io.StringIO()
    with fixed_style():
        figure = _figure(*panel.size, "none")
        panel.draw(_axes(figure, (0.0, 0.0, 1.0, 1.0)))
        figure.savefig(text, format="svg", metadata=NO_METADATA)
    return svg_element(text.getvalue(), panel.size, name, panel.title)


def svg_element(drawn: str, size: tuple[float, float], name: str, title: str) -> str:
    """What matplotlib saved as SVG, as an element of a page, in the colours of its style sheet.

    Args:
        drawn: the whole file.
        size: its width and height, in points.
        name: unique on the page, of letters, digits and hyphens.
        title: for those who cannot see it.
    """
    width, height = size
    # Before it are the XML header and a style that would hold for the whole page.
    body = drawn.partition("</defs>")[2]
    body = re.sub(r' d="[^"]+"', _shortened, re.sub(r">\s+<", "><", body))
    body = re.sub(r'id="|(?<=url\()#|(?<=href=")#', lambda found: f"{found[0]}{name}-", body)
    for colour, value in LIGHT.items():
        body = body.replace(value, f"var(--{colour})")
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}">{body.strip()}'


def _shortened(path: re.Match[str]) -> str:
    """Path data with one decimal and without needless spaces: half the size."""
    return re.sub(r"\s*([MLCQz])\s*", r"\1", re.sub(r"(\.\d)\d+", r"\1", path[0]))


@contextmanager
def fixed_style() -> Iterator[None]:
    """matplotlib's defaults in place of the user's settings, so that the output is the same everywhere."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


def _figure(width: float, height: float, colour: str) -> Figure:
    return Figure((width / _UNITS_PER_INCH, height / _UNITS_PER_INCH), dpi=PNG_DPI, facecolor=colour)


def _axes(figure: Figure, place: tuple[float, float, float, float]) -> Axes:
    axes = figure.add_axes(place, facecolor=LIGHT["panel"], xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return axes
