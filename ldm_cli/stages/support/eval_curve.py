"""The result of a sweep as a table with one row per point, and as curves of Fréchet distance against CLIP score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm_cli.plots.tradeoff import Curve, CurvePoint, Estimate, save_tradeoff

Point = Mapping[str, Any]
"""`pipeline`, `settings` and `metrics`, as `ldm eval` returns them."""


def save_curve(points: Sequence[Point], file: Path) -> list[Path]:
    """Draw a line for each pipeline, and for each combination of the settings but the first.

    Args:
        file: without its suffix.

    Returns:
        The files; none where CLIP score or distance was not measured, or there is but one point.

    Raises:
        OutputError, StorageError: writing failed.
    """
    distance = _distance_of(points[0]) if points else None
    if distance is None or len(points) < 2 or "clip_score" not in points[0]["metrics"]:
        return []
    metric, name = distance
    lines: dict[str, list[CurvePoint]] = {}
    for point in points:
        first, *others = [*point["settings"].items()] or [("", "")]
        line = ", ".join([point["pipeline"], *(f"{field} {value}" for field, value in others)])
        score = _estimate(point["metrics"]["clip_score"]["generated"], "clip_score")
        lines.setdefault(line, []).append(CurvePoint(str(first[1]), score, _estimate(point["metrics"][metric], name)))
    curves = [Curve(line, found) for line, found in lines.items()]
    beside = "".join(f" (beside each point: {field})" for field in list(points[0]["settings"])[:1])
    return save_tradeoff(curves, f"CLIP score{beside}", name.replace("fid", "FID"), file)


def _distance_of(point: Point) -> tuple[str, str] | None:
    """The metric that measured a Fréchet distance, and the name of the number: FID, else that on CLIP's features."""
    for metric in ("fid", "frechet_distance"):
        for name in point["metrics"].get(metric, ()):
            return metric, name
    return None


def _estimate(numbers: Mapping[str, Any], name: str) -> Estimate:
    interval = numbers[f"{name}_interval"]
    return Estimate(numbers[name], None if interval is None else (interval[0], interval[1]))
