"""The lesson as one HTML page that needs nothing else: figures as SVG, data and program of the explorer inside."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_cli.lesson.drawing import COLOURS, svg
from ldm_cli.lesson.experiment import GRID_SIZE, Lesson
from ldm_cli.lesson.figures import Plate, colour_groups, field_opacity

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


def page(lesson: Lesson, plates: Sequence[Plate], facts: Mapping[str, Any]) -> str:
    """The page as HTML text.

    Args:
        lesson: data of the explorer.
        plates: the figures.
        facts: from `experiment.facts`.
    """
    light, dark = ("".join(f"--{name}:{pair[i]};" for name, pair in COLOURS.items()) for i in (0, 1))
    parts = {
        "LIGHT": light,
        "DARK": dark,
        "FIGURES": "\n".join(_section(number, plate) for number, plate in enumerate(plates, 1)),
        "FACTS": _table(facts),
        "DATA": json.dumps(_explorer(lesson), ensure_ascii=False, separators=(",", ":")),
    }
    text = _TEMPLATE.read_text(encoding="utf-8")
    for name, part in parts.items():
        text = text.replace(f"@{name}@", part)
    return text


def _section(number: int, plate: Plate) -> str:
    figure = plate.figure
    panels = "".join(
        f'<div class="panel{" wide" if panel.columns > 1 else ""}">{svg(panel, f"{figure.name}-{i}")}</div>'
        for i, panel in enumerate(figure.panels)
    )
    return (
        f'<section id="{figure.name}"><h2><span class="number">{number}</span>{plate.title[0]}'
        f'<small lang="zh">{plate.title[1]}</small></h2>'
        f'<figure><div class="panels" style="--columns:{figure.columns}">{panels}</div>'
        f'<figcaption><p>{plate.sentence[0]}</p><p lang="zh">{plate.sentence[1]}</p></figcaption></figure></section>'
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
    """What the explorer draws: positions and arrows at evenly spaced times, as little-endian 16-bit integers."""
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
