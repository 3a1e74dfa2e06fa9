import xml.etree.ElementTree as ET

import matplotlib
import torch
from PIL import Image

from ldm_cli.plots.panels import DARK, LIGHT, Panel, dots, line, save_png, svg


def panel(draw, title="a < b"):
    def on_unit_axes(axes):
        axes.set(xlim=(-1, 1), ylim=(-1, 1))
        draw(axes)

    return Panel(title, on_unit_axes, (200.0, 200.0))


def draw_marks(axes):
    dots(axes, torch.tensor([[-0.5, 0.5], [5.0, 5.0]]), "arm0", 6.0, 1.0)
    line(axes, torch.tensor([[-9.0, -0.5], [9.0, -0.5]]), "arm4", 8.0)


def near(found, colour, tolerance=14):
    wanted = [int(LIGHT[colour][i : i + 2], 16) for i in (1, 3, 5)]
    return all(abs(a - b) <= tolerance for a, b in zip(found, wanted, strict=True))


def test_marks_stand_where_the_data_are_and_end_at_the_edge_of_their_panel(tmp_path):
    save_png([panel(draw_marks), panel(lambda axes: None)], 2, tmp_path / "f.png")
    with Image.open(tmp_path / "f.png") as image:
        pixels = image.convert("RGB")
    # Two pixels a point: a margin of 8 points, a title of 30, and 16 between panels.
    assert pixels.size == (2 * (200 + 16 + 200 + 16), 2 * (200 + 30 + 16))

    def at(x, y, column=0):
        return pixels.getpixel((16 + 432 * column + round((x + 1) * 200), 76 + round((1 - y) * 200)))

    assert near(at(-0.5, 0.5), "arm0")
    assert near(at(-0.5, 0.0), "panel")
    assert near(at(0.9, -0.5), "arm4")
    assert near(at(1.04, -0.5), "paper", 3)
    assert near(at(-0.9, -0.5, column=1), "panel")


def test_every_point_inside_is_one_stroke_of_the_svg_in_a_colour_of_the_page():
    root = ET.fromstring(svg(panel(lambda axes: dots(axes, torch.rand(700, 2), "arm1", 2.0, 0.8)), "f-0"))
    assert root.get("aria-label") == "a < b"
    (path,) = [e for e in root.iter() if "stroke: var(--arm1)" in e.get("style", "")]
    assert path.get("d").count("M") == 700
    ids = [e.get("id") for e in root.iter() if e.get("id")]
    assert all(identifier.startswith("f-0-") for identifier in ids)
    assert path.get("clip-path")[5:-1] in ids


def test_the_same_panel_gives_the_same_bytes_whatever_the_settings_of_matplotlib(tmp_path):
    drawn = panel(draw_marks)
    save_png([drawn], 1, tmp_path / "a.png")
    text = svg(drawn, "f")
    with matplotlib.rc_context({"axes.grid": True, "font.size": 20, "savefig.transparent": True}):
        save_png([drawn], 1, tmp_path / "b.png")
        assert svg(drawn, "f") == text
        assert matplotlib.rcParams["font.size"] == 20
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_dark_colours_have_the_names_of_the_light_ones():
    assert DARK.keys() == LIGHT.keys()
