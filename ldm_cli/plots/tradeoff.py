"""The trade-off of a sweep: one figure with a line for each model, and error bars."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ldm_cli.plots.lines import COLOURS
from ldm_cli.plots.panels import LIGHT, NO_METADATA, PNG_DPI, fixed_style
from ldm_cli.storage import whole_file

_SIZE = (7.5, 5.0)


@dataclass(frozen=True)
class Estimate:
    """A number, and the two ends of its bar, such as a 95 % interval, where they are known."""

    value: float
    interval: tuple[float, float] | None = None

    @property
    def reach(self) -> tuple[float, float]:
        """How far the interval reaches below and above the value."""
        low, high = self.interval or (self.value, self.value)
        return self.value - low, high - self.value


@dataclass(frozen=True)
class CurvePoint:
    """A point of a curve, and the text beside it."""

    label: str
    x: Estimate
    y: Estimate


@dataclass(frozen=True)
class Curve:
    """The points of a model, joined in this order."""

    name: str
    points: Sequence[CurvePoint]


def save_tradeoff(curves: Sequence[Curve], x_label: str, y_label: str, file: Path) -> list[Path]:
    """Draw curves into `file` with the suffixes `.svg` and `.png`; returns both paths.

    Raises:
        OutputError, StorageError: writing failed.
    """
    with fixed_style():
        figure = Figure(_SIZE, dpi=PNG_DPI, facecolor=LIGHT["paper"], layout="constrained")
        axes = figure.add_subplot(facecolor=LIGHT["panel"])
        for number, curve in enumerate(curves):
            _draw(axes, curve, LIGHT[COLOURS[number % len(COLOURS)]])
        axes.set_xlabel(x_label, color=LIGHT["ink"])
        axes.set_ylabel(y_label, color=LIGHT["ink"])
        axes.spines[:].set_visible(False)
        axes.grid(color=LIGHT["data"], linewidth=0.6)
        axes.tick_params(length=0, labelcolor=LIGHT["muted"])
        if len(curves) > 1:
            axes.legend(frameon=False, labelcolor="linecolor")
        return [_saved(figure, file.with_suffix(suffix)) for suffix in (".svg", ".png")]


def _draw(axes: Axes, curve: Curve, colour: str) -> None:
    xs, ys = [point.x for point in curve.points], [point.y for point in curve.points]
    axes.errorbar(
        [x.value for x in xs],
        [y.value for y in ys],
        xerr=list(zip(*(x.reach for x in xs), strict=True)),
        yerr=list(zip(*(y.reach for y in ys), strict=True)),
        color=colour,
        linewidth=2.0,
        elinewidth=0.9,
        marker="o",
        markersize=4.5,
        label=curve.name,
    )
    for point in curve.points:
        place = (point.x.value, point.y.value)
        axes.annotate(point.label, place, (5, 5), textcoords="offset points", fontsize=8.5, color=colour)


def _saved(figure: Figure, file: Path) -> Path:
    content = io.BytesIO()
    metadata = NO_METADATA if file.suffix == ".svg" else None
    figure.savefig(content, format=file.suffix[1:], facecolor=figure.get_facecolor(), metadata=metadata)
    with whole_file(file) as temporary:
        temporary.write_bytes(content.getvalue())
    return file
