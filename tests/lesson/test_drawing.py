import xml.etree.ElementTree as ET

import torch
from PIL import Image

from ldm_cli.lesson.drawing import COLOURS, PANEL_SIZE, Arrows, Dots, Figure, Line, Panel, Text, save_png, svg


def panel(*marks, view=(-1.0, 1.0, -1.0, 1.0)):
    return Panel("a < b", marks, view)


def near(found, colour, tolerance=14):
    text = COLOURS[colour][0]
    wanted = [int(text[i : i + 2], 16) for i in (1, 3, 5)]
    return all(abs(a - b) <= tolerance for a, b in zip(found, wanted, strict=True))


def test_marks_stand_where_the_data_are_with_y_upwards(tmp_path):
    marks = (
        Dots(torch.tensor([[-0.5, 0.5], [5.0, 5.0]]), "arm0", 6.0, 1.0),
        Line(torch.tensor([[0.2, -0.5], [0.8, -0.5]]), "arm4", 4.0),
        Arrows(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.5, 0.0]]), torch.ones(1)),
    )
    save_png(Figure("f", [panel(*marks)], 1), tmp_path / "f.png")
    with Image.open(tmp_path / "f.png") as image:
        pixels = image.convert("RGB")
    assert pixels.width == 2 * (PANEL_SIZE + 16)
    assert pixels.height == 2 * (PANEL_SIZE + 30 + 16)

    def at(x, y):
        left, top = 2 * 8, 2 * (8 + 30)
        return pixels.getpixel((left + round((x + 1) * PANEL_SIZE), top + round((1 - y) * PANEL_SIZE)))

    assert near(at(-0.5, 0.5), "arm0")
    assert near(at(-0.5, -0.5), "panel")
    assert near(at(0.5, -0.5), "arm4")
    assert near(at(0.2, 0.0), "arrow")
    assert near(at(0.2, 0.2), "panel")


def test_what_leads_out_of_a_panel_is_cut_off_at_its_edge(tmp_path):
    across = Line(torch.tensor([[-9.0, 0.0], [9.0, 0.0]]), "arm0", 8.0)
    save_png(Figure("f", [panel(), panel(across)], 2), tmp_path / "f.png")
    with Image.open(tmp_path / "f.png") as image:
        pixels = image.convert("RGB")
    y = 2 * (8 + 30) + PANEL_SIZE
    left, gap, right, margin = (pixels.getpixel((x, y)) for x in (300, 2 * 316, 2 * 470, pixels.width - 6))
    assert near(left, "panel")
    assert near(gap, "paper", 3)
    assert near(right, "arm0")
    assert near(margin, "paper", 3)


def test_the_svg_holds_every_point_inside_once_and_escapes_its_texts():
    dots = Dots(torch.tensor([[0.0, 0.0], [0.5, 0.5], [3.0, 0.0]]), "arm1")
    root = ET.fromstring(svg(panel(dots, Text(0.0, 0.0, "x & y")), "f-0"))
    (path,) = [e for e in root.iter() if e.tag.endswith("path")]
    assert path.get("d") == "M150.0 180.0h0M225.0 105.0h0"
    assert path.get("stroke") == "var(--arm1)"
    assert [e.text for e in root.iter() if e.tag.endswith("text")] == ["a < b", "x & y"]
