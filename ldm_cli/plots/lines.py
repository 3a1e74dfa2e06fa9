"""Line charts for a page, as SVG in the colours of its style sheet."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ldm_cli.plots.panels import LIGHT, NO_METADATA, fixed_style, svg_element

COLOURS = ("arm0", "arrow", "arm3", "arm1", "arm5", "arm4", "ink")
"""Names of the colours of lines, in turn."""
STYLES = ("-", "--", ":", "-.")
"""Dashes of lines, in turn each time the colours are used up."""
MAX_POINTS = 600
"""Points of a line at most, or a few more; of more, the lowest and highest of each stretch are kept."""

_SIZE = (460.0, 270.0)
_UNITS_PER_INCH = 72


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        xs, ys: its points; finite numbers.
        number: tells its colour and dashes.
        label: in the legend; empty: none.
        is_second: a thin line, of a figure that stands beside the main one.
    """

    xs: Sequence[float]
    ys: Sequence[float]
    number: int
    label: str = ""
    is_second: bool = False


def thinned(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most about `MAX_POINTS` points that look the same: first, last, and the extremes of equal stretches."""
    if len(xs) <= MAX_POINTS:
        return list(xs), list(ys)
    step = 2 * len(xs) / MAX_POINTS
    kept = {0, len(xs) - 1}
    for number in range(MAX_POINTS // 2):
        stretch = range(int(number * step), min(len(xs), int((number + 1) * step)))
        if stretch:
            kept |= {min(stretch, key=ys.__getitem__), max(stretch, key=ys.__getitem__)}
    places = sorted(kept)
    return [xs[i] for i in places], [ys[i] for i in places]


def line_chart(title: str, name: str, lines: Sequence[Line], x_label: str) -> str:
    """Lines in one chart, as an SVG element.

    The axis of y is logarithmic where all numbers are positive and the largest is 50 times the smallest or more.

    Args:
        title: for those who cannot see the chart.
        name: unique on the page, of letters, digits and hyphens.
        lines: at least one with a point.
        x_label: below the chart.
    """
    text = io.StringIO()
    ys = [y for line in lines for y in line.ys]
    with fixed_style():
        figure = Figure(
            (_SIZE[0] / _UNITS_PER_INCH, _SIZE[1] / _UNITS_PER_INCH), facecolor="none", layout="constrained"
        )
        axes = figure.add_subplot(facecolor=LIGHT["panel"])
        for line in lines:
            xs, own = thinned(line.xs, line.ys)
            axes.plot(
                xs,
                own,
                color=LIGHT[COLOURS[line.number % len(COLOURS)]],
                linestyle=STYLES[line.number // len(COLOURS) % len(STYLES)],
                linewidth=1.0 if line.is_second else 1.8,
                alpha=0.55 if line.is_second else 1.0,
                marker="o" if len(xs) == 1 else "",
                markersize=4,
                label=line.label or None,
            )
        if min(ys) > 0 and max(ys) >= 50 * min(ys):
            axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.set_xlabel(x_label, color=LIGHT["muted"], fontsize=11)
        axes.spines[:].set_visible(False)
        axes.grid(color=LIGHT["data"], linewidth=0.5)
        axes.tick_params(which="both", length=0, labelcolor=LIGHT["muted"], labelsize=11)
        if any(line.label for line in lines):
            axes.legend(frameon=False, labelcolor="linecolor", fontsize=11)
        figure.savefig(text, format="svg", metadata=NO_METADATA)
    return svg_element(text.getvalue(), _SIZE, name, title)
