"""Runs as one HTML page that loads nothing else."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from ldm_cli.plots.lines import COLOURS, Line, line_chart
from ldm_cli.plots.panels import DARK, LIGHT
from ldm_cli.stages.support.run_summary import RunSummary

MARK = '<meta name="generator" content="ldm report">'
"""Is in every page of this kind, and in no other."""
_TEMPLATE = Path(__file__).with_name("report_page.html")
_MAX_GRIDS, _MAX_SIDE, _MIN_SIDE = 24, 1024, 512
_LEVEL = re.compile(r"^(.+)/level(\d+)(_ema)?$")
_FIRST = ("loss", "val_loss", "val_loss/level", "lr", "grad_norm", "images_per_second")


def report_page(runs: Sequence[RunSummary], evaluations: Mapping[str, Any] | None, refresh: float | None) -> str:
    """The page as text.

    Args:
        runs: at least one.
        evaluations: result of `compare_results.run`, or None.
        refresh: seconds after which a browser reads the page again, while a run goes on; None: never.
    """
    parts = {
        "MARK": MARK + (f'<meta http-equiv="refresh" content="{refresh:g}">' if refresh else ""),
        "LIGHT": "".join(f"--{name}:{value};" for name, value in LIGHT.items()),
        "DARK": "".join(f"--{name}:{value};" for name, value in DARK.items()),
        "TITLE": escape(", ".join(run.name for run in runs[:3]) + (f" and {len(runs) - 3} more" if runs[3:] else "")),
        "RUNS": "".join(_card(number, run) for number, run in enumerate(runs)),
        "CHARTS": _section("Figures", _charts(runs)),
        "SAMPLES": _section("Samples", "".join(_samples(run) for run in runs if run.grids)),
        "EVALUATIONS": _section("Evaluations", _evaluations(evaluations) + "".join(map(_curves, runs))),
        "RECIPES": _section("Recipes", _recipes([run for run in runs if run.recipe])),
        "ENVIRONMENT": _section("Environment", _environment([run for run in runs if run.environment])),
    }
    text = _TEMPLATE.read_text(encoding="utf-8")
    return re.sub("@([A-Z]+)@", lambda found: parts[found[1]], text)


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _card(number: int, run: RunSummary) -> str:
    colour = COLOURS[number % len(COLOURS)]
    problems = "".join(f"<p class='problem'>{escape(problem)}</p>" for problem in run.problems)
    log = escape("\n".join(run.log))
    log = f"<details><summary>last lines of log.txt</summary><pre>{log}</pre></details>" if log else ""
    last = {name: numbers[-1] for name, (_, numbers) in run.figures.items() if name in ("loss", "val_loss")}
    figures = " · ".join(f"{name} {value:.4g}" for name, value in last.items())
    return (
        f'<article style="border-color:var(--{colour})"><h3>{escape(run.name)}</h3>'
        f"<p><b>{escape(run.state)}</b> {escape(run.progress)}</p><p>{figures}</p>{problems}{log}</article>"
    )


def _charts(runs: Sequence[RunSummary]) -> str:
    """Charts of what has several points; of what has one a run, such as a last validation, a table."""
    names = dict.fromkeys(name for run in runs for name in run.figures)
    bases = dict.fromkeys(_LEVEL.sub(r"\1/level", name).removesuffix("_ema") for name in names)
    curves = [base for base in bases if base.endswith("/level") or _has_curve(base, runs)]
    ordered = sorted(curves, key=lambda base: _FIRST.index(base) if base in _FIRST else len(_FIRST))
    charts = "".join(_chart(number, base, runs) for number, base in enumerate(ordered))
    single = [name for name in names if not _LEVEL.match(name) and name.removesuffix("_ema") not in curves]
    last = [
        [name, *(_short(run.figures[name][1][-1] if name in run.figures else None) for run in runs)] for name in single
    ]
    table = _table(["last value", *(run.name for run in runs)], last) if last else ""
    return (f'<div class="charts">{charts}</div>' if charts else "") + table


def _has_curve(base: str, runs: Sequence[RunSummary]) -> bool:
    """Whether a run has two points or more, which are not all 0."""
    found = (run.figures[name] for run in runs for name in (base, f"{base}_ema") if name in run.figures)
    return any(len(steps) > 1 and any(numbers) for steps, numbers in found)


def _chart(number: int, base: str, runs: Sequence[RunSummary]) -> str:
    """One figure of all runs over the steps; of validation by noise level, the last one over the levels."""
    if base.endswith("/level"):
        title, x_label = f"{base.removesuffix('/level')} by noise level", "level, from little to much noise"
        lines = [line for place, run in enumerate(runs) if (line := _levels(place, run, base))]
    else:
        title, x_label = base.replace("_", " "), "step"
        lines = [
            Line(*run.figures[name], place, is_second=name != base)
            for place, run in enumerate(runs)
            for name in (base, f"{base}_ema")
            if name in run.figures
        ]
        if any(line.is_second for line in lines):
            title += " (thin: averaged weights)"
    if not lines:
        return ""
    return f"<figure><figcaption>{escape(title)}</figcaption>{line_chart(title, f'c{number}', lines, x_label)}</figure>"


def _levels(place: int, run: RunSummary, base: str) -> Line | None:
    found = {int(m[2]): run.figures[name][1][-1] for name in run.figures if (m := _LEVEL.match(name)) and not m[3]}
    own = {level: value for level, value in found.items() if f"{base}{level}" in run.figures}
    return Line(sorted(own), [own[level] for level in sorted(own)], place) if own else None


def _samples(run: RunSummary) -> str:
    """Grids through time with a slider; of very many, evenly spaced ones."""
    steps = list(run.grids)
    if len(steps) > _MAX_GRIDS:
        steps = [steps[round(i * (len(steps) - 1) / (_MAX_GRIDS - 1))] for i in range(_MAX_GRIDS)]
    images = []
    for step in steps:
        try:
            images.append((step, _embedded(run.grids[step])))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            images.append((step, ""))
            run.problems.append(f"{run.grids[step].name} of step {step}: {error}")
    last = len(images) - 1
    shown = "".join(
        f'<img alt="samples of step {step}" data-step="{step}" src="{source}"{"" if i == last else " hidden"}>'
        for i, (step, source) in enumerate(images)
    )
    name = escape(run.name)
    slider = (
        f'<label>step <output>{images[last][0]}</output><input type="range" min="0" max="{last}" value="{last}" '
        f'aria-label="step of the samples of {name}"></label>'
    )
    return f'<figure class="samples"><figcaption>{name}</figcaption>{slider}<div>{shown}</div></figure>'


def _embedded(file: Path) -> str:
    """A picture as a data address: small ones enlarged without smoothing, large ones reduced, as WebP."""
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    side = max(image.size)
    if side > _MAX_SIDE:
        image.thumbnail((_MAX_SIDE, _MAX_SIDE))
    elif side < _MIN_SIDE:
        factor = -(-_MIN_SIDE // side)
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    content = io.BytesIO()
    image.save(content, "WEBP", quality=90)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"


def _curves(run: RunSummary) -> str:
    found = [(file, base64.b64encode(file.read_bytes()).decode()) for file in run.curves]
    return "".join(
        f"<figure><figcaption>{escape(run.name)}: {escape(file.stem)}</figcaption>"
        f'<img class="plot" alt="{escape(file.stem)}" src="data:image/svg+xml;base64,{content}"></figure>'
        for file, content in found
    )


def _evaluations(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    results = found["results"]
    names = dict.fromkeys(name for one in results for name in one["numbers"])
    rows = [[name, *(_short(one["numbers"].get(name)) for one in results)] for name in names]
    refused = "".join(
        f"<p>{escape(name)} is left out: {escape(why)}</p>" for name, why in found["not_compared"].items()
    )
    return _table(["", *(one["name"] for one in results)], rows) + refused


def _recipes(runs: Sequence[RunSummary]) -> str:
    """Fields in which runs differ; then every field of the first one."""
    if not runs:
        return ""
    names = dict.fromkeys(name for run in runs for name in run.recipe)
    heads = ["field", *(run.name for run in runs)]
    rows = [[name, *(_short(run.recipe.get(name)) for run in runs)] for name in names]
    different = [row for row in rows if len(set(row[1:])) > 1]
    table = _table(heads, different) if different else ""
    if len(runs) > 1 and not different:
        table = "<p>The recipes are equal.</p>"
    whole = _table(heads[:2], [row[:2] for row in rows])
    return f"{table}<details><summary>every field of {escape(runs[0].name)}</summary>{whole}</details>"


def _environment(runs: Sequence[RunSummary]) -> str:
    names = dict.fromkeys(name for run in runs for name in run.environment)
    rows = [[name, *(_short(run.environment.get(name)) for run in runs)] for name in names]
    return _table(["", *(run.name for run in runs)], rows) if runs else ""


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list) and all(isinstance(one, float) for one in value):
        return " – ".join(f"{one:.4g}" for one in value)
    return "" if value is None else str(value)


def _table(heads: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(one)}</th>" for one in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
