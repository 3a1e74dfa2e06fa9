"""The figure of a sweep: where its points, error bars and names are."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

from PIL import Image

from ldm_cli.plots.tradeoff import Curve, CurvePoint, Estimate, save_tradeoff


def curve(name: str, *points: tuple[float, float]) -> Curve:
    return Curve(name, [CurvePoint(f"scale {x:g}", Estimate(x), Estimate(y, (y - 1, y + 2))) for x, y in points])


def test_both_files_name_the_models_and_label_the_points(tmp_path: Path) -> None:
    curves = [curve("small", (1, 10), (2, 8)), curve("large <b>", (3, 4))]
    vector, pixels = save_tradeoff(curves, "CLIP score", "FID", tmp_path / "curve")
    assert (vector.name, pixels.name) == ("curve.svg", "curve.png")
    texts = [element.text for element in ET.parse(vector).iter("{http://www.w3.org/2000/svg}text")]
    assert {"small", "large <b>", "CLIP score", "FID", "scale 1", "scale 2", "scale 3"} <= set(texts)
    with Image.open(pixels) as image:
        assert image.size == (1080, 720)


def test_an_error_bar_reaches_from_end_to_end_of_its_interval(tmp_path: Path) -> None:
    (vector, _) = save_tradeoff([curve("one", (1, 10), (2, 20))], "x", "y", tmp_path / "curve")
    text = vector.read_text()
    bars = re.search(r'id="LineCollection_2">(.*?)</g>', text, re.DOTALL)
    assert bars
    ends = [float(y) for y in re.findall(r"[ML] \S+ (\S+)", bars[1])]
    lengths = [abs(a - b) for a, b in zip(ends[::2], ends[1::2], strict=True)]
    marks = [float(y) for y in re.findall(r'<use [^>]*y="([\d.]+)" style="fill: #e4572e', text)]
    per_unit = abs(marks[1] - marks[0]) / 10
    assert [round(length / per_unit, 2) for length in lengths] == [3.0, 3.0]
    assert round(abs(ends[0] - marks[0]) / per_unit, 2) == 1.0 or round(abs(ends[1] - marks[0]) / per_unit, 2) == 1.0


def test_the_same_points_make_the_same_file(tmp_path: Path) -> None:
    files = [save_tradeoff([curve("one", (1, 10))], "x", "y", tmp_path / name)[0] for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
