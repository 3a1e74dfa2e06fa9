"""The lesson as one HTML page that loads nothing else. It holds the figures as SVG, and the explorer with its data."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_cli.lesson.experiment import GRID_SIZE, Lesson
from ldm_cli.lesson.figures import LessonFigure, colour_groups, field_opacity
from ldm_cli.plots.panels import DARK, LIGHT, svg

_TEMPLATE = Path(__file__).with_name("page.html")
_NUM_TIMES = 34
_NUM_POINTS = 260
_UNITS = 8000.0
_METHODS = {
    "forward": ("forward", "前向加噪"),
    "ddpm": ("DDPM", "DDPM"),
    "quiet": ("DDPM, no noise", "DDPM，不加噪声"),
    "ddim": ("DDIM", "DDIM"),
}


def page(lesson: Lesson, figures: Sequence[LessonFigure], facts: Mapping[str, Any]) -> str:
    """The page as HTML text."""
    parts = {
        "LIGHT": _variables(LIGHT),
        "DARK": _variables(DARK),
        "FIGURES": "\n".join(_section(number, figure) for number, figure in enumerate(figures, 1)),
        "FACTS": _table(facts),
        "DATA": json.dumps(_explorer(lesson), ensure_ascii=False, separators=(",", ":")),
    }
    text = _TEMPLATE.read_text(encoding="utf-8")
    for name, part in parts.items():
        text = text.replace(f"@{name}@", part)
    return text


def _variables(colours: Mapping[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in colours.items())


def _section(number: int, figure: LessonFigure) -> str:
    panels = "".join(
        f'<div class="panel"><h3>{panel.title}</h3>{svg(panel, f"{figure.name}-{i}")}</div>'
        for i, panel in enumerate(figure.panels)
    )
    title, caption = figure.title, figure.caption
    return (
        f'<section id="{figure.name}"><h2><span class="number">{number}</span>{title.english}'
        f'<small lang="zh">{title.chinese}</small></h2>'
        f'<figure><div class="panels" style="--columns:{figure.columns}">{panels}</div>'
        f'<figcaption><p>{caption.english}</p><p lang="zh">{caption.chinese}</p></figcaption></figure></section>'
    )


def _table(facts: Mapping[str, Any]) -> str:
    rows = {
        "data": "data 数据",
        "ddpm": "DDPM",
        "quiet": "DDPM, no noise 不加噪声",
        "ddim": "DDIM",
    }
    return "".join(
        f"<tr><th>{label}</th><td>{m['distance_to_spiral']:.3f}</td><td>{m['spread']:.2f}</td>"
        f"<td>{m['near_middle']:.0%}</td><td>{m['arm_covered']:.0%}</td></tr>"
        for label, m in ((label, facts["methods"][name]) for name, label in rows.items())
    )


def _explorer(lesson: Lesson) -> dict[str, Any]:
    """The explorer's data: positions and arrows at evenly spaced times, as little-endian 16-bit integers."""
    last = len(lesson.levels) - 1
    times = [round(i * last / (_NUM_TIMES - 1)) for i in range(_NUM_TIMES)]
    walks = {"forward": lesson.forward, **lesson.backward}
    arrows = torch.stack([lesson.levels[t].signal * lesson.field[t] - lesson.grid for t in times])
    opacity = torch.stack([field_opacity(lesson.grid, lesson.levels[t], lesson.data.xy) for t in times])
    methods = {}
    for name, walk in walks.items():
        # The slider's last stop is clean.
        stops = torch.stack([walk.at(-1.0), *(walk.at(float(t)) for t in times[1:])])
        thinned = torch.linspace(0, stops.shape[1] - 1, _NUM_POINTS).long()
        colours = colour_groups(walk.at(-1.0))[thinned].tolist()
        methods[name] = {"label": _METHODS[name], "xy": _packed(stops[:, thinned] * _UNITS), "colours": colours}
    return {
        "times": times,
        "units": _UNITS,
        "points": _NUM_POINTS,
        "gridSize": GRID_SIZE,
        "grid": _packed(lesson.grid * _UNITS),
        "arrows": _packed(arrows * _UNITS),
        "opacity": _packed(opacity * _UNITS),
        "spiral": _packed(lesson.data.xy[::8] * _UNITS),
        "methods": methods,
    }


def _packed(values: Tensor) -> str:
    """Numbers as base64 of little-endian int16."""
    integers = values.round().clamp(-32768, 32767).to(torch.int32).flatten().tolist()
    return base64.b64encode(b"".join(value.to_bytes(2, "little", signed=True) for value in integers)).decode("ascii")
