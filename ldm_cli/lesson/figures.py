"""The figures of the lesson, each with one sentence that says what to see, in English and in Chinese."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_cli.core.diffusion.process import Level
from ldm_cli.lesson.drawing import Arrows, Dots, Figure, Line, Mark, Panel, Text
from ldm_cli.lesson.experiment import Lesson, Walk
from ldm_cli.lesson.spiral import NUM_CLASSES, nearest

NUM_COLOURS = 6
_CLASS_COLOURS = ("arm0", "arm3", "arm5")
_STOPS = (-1.0, 20.0, 50.0, 100.0, 199.0)
_FIELD_STOPS = (199, 100, 60, 30, 15, 5)
_NUM_TRAILS = 4


@dataclass(frozen=True)
class Plate:
    """A figure and what is said of it.

    Attributes:
        figure: the drawing.
        title: English and Chinese.
        sentence: what to see, English and Chinese.
    """

    figure: Figure
    title: tuple[str, str]
    sentence: tuple[str, str]


def plates(lesson: Lesson) -> list[Plate]:
    """All figures, in the order of the lesson."""
    return [
        Plate(
            _walks("forward", lesson, lesson.forward, lesson.forward.stops[0], _STOPS),
            ("Forward: every point walks into noise", "前向：每个点都随机走进噪声"),
            (
                "A little noise is added at every step, and after 200 steps nothing in the cloud tells where on the "
                "spiral a point began.",
                "每一步都加入一点噪声；200 步之后，从这团点里再也看不出每个点原来在螺旋的哪个位置。",
            ),
        ),
        Plate(
            _field(lesson),
            ("The learned field: to the mean first, to the data last", "学到的向量场：先指向均值，后指向数据"),
            (
                "Each arrow leads to where the network believes the clean point to be: to the mean of all data while "
                "noise is strong, to the nearest part of the arm when it is weak; faint arrows lie where noised data "
                "hardly ever is.",
                "箭头指向网络所认为的干净点：噪声强时指向全部数据的均值，噪声弱时指向最近的那段螺旋；"
                "颜色浅的箭头处几乎没有加噪数据。",
            ),
        ),
        Plate(
            _compass(lesson),
            ("The same in numbers", "同一件事，用数字说"),
            (
                "The best arrow there is, computed from the data in closed form, turns from the mean (right) to the "
                "nearest point (left) as noise fades, and the learned arrow follows it.",
                "由数据直接算出的最优箭头，随噪声减弱，从指向均值（右端）转为指向最近的数据点（左端），"
                "而学到的箭头跟着它走。",
            ),
        ),
        Plate(
            _walks("ddpm", lesson, lesson.backward["ddpm"], lesson.backward["ddpm"].end, _STOPS[::-1]),
            ("DDPM: step towards the data, and add noise again", "DDPM：朝数据走一步，再加回一点噪声"),
            (
                "Every step goes towards the prediction and adds fresh noise, so that colours mix for long, and the "
                "points end up all along the spiral as the data do.",
                "每一步先走向预测，再加入新的噪声，所以各色的点混合了很久，最后像数据一样铺满整条螺旋。",
            ),
        ),
        Plate(
            _walks("ddpm-without-noise", lesson, lesson.backward["quiet"], lesson.backward["quiet"].end, _STOPS[::-1]),
            ("DDPM without its noise: everything collapses", "去掉噪声的 DDPM：全部塌缩"),
            (
                "The same steps without the noise that belongs to them go too far: all points fall into the middle, "
                "and as noise fades they creep on together to the inner edge of the spiral.",
                "同样的步子，却少了本该加回的噪声，就走过了头：所有点都落到中间，随着噪声减弱，又一起挪到螺旋的内缘。",
            ),
        ),
        Plate(
            _walks("ddim", lesson, lesson.backward["ddim"], lesson.backward["ddim"].end, _STOPS[::-1]),
            ("DDIM: no noise, shorter steps, the same field", "DDIM：不加噪声、步子更短，用的是同一个向量场"),
            (
                "DDIM takes steps of the right length for walking without noise, so the noise cloud is folded into the "
                "spiral without mixing: neighbours in colour were neighbours in the noise.",
                "DDIM 按“不加噪声”取恰当的步长，把噪声云不经混合地折叠成螺旋：终点相邻（同色）的点，起点也相邻。",
            ),
        ),
        Plate(
            _classes(lesson),
            ("Classes, without and with guidance", "按类别采样：无引导与有引导"),
            (
                "Asked for a class, the network draws what that class looks like, overlaps included; guidance pushes "
                "away from what it would draw anyway, and each class draws back to what is only its own.",
                "给定类别，网络画出该类的样子，连与邻类的重叠也一起画出；引导则把样本推离“不给类别也会画的东西”，"
                "于是每一类都收缩到只属于自己的部分。",
            ),
        ),
    ]


def colour_groups(end: Tensor) -> Tensor:
    """Number 0 … 5 of each point's colour, by its place on the arm, int64 [N]."""
    return (nearest(end)[0] * NUM_COLOURS).long().clamp(max=NUM_COLOURS - 1)


def _coloured(xy: Tensor, groups: Tensor) -> list[Mark]:
    return [Dots(xy[groups == i], f"arm{i}", 2.1) for i in range(NUM_COLOURS)]


def _backdrop(lesson: Lesson) -> Dots:
    """The data set, pale."""
    return Dots(lesson.data.xy[::3], "data", 1.3, 0.55)


def _walks(name: str, lesson: Lesson, walk: Walk, coloured_by: Tensor, stops: tuple[float, ...]) -> Figure:
    """The points at these times, with the ways that a few have come."""
    groups, panels = colour_groups(coloured_by), []
    trails = [int(torch.nonzero(groups == i)[0, 0]) for i in range(NUM_COLOURS) if bool((groups == i).any())]
    for t in stops:
        stop = walk.index(t)
        trail = [Line(walk.stops[: stop + 1, i], "ink", 1.0, 0.4) for i in trails[:_NUM_TRAILS] if stop > 0]
        heads = Dots(walk.stops[stop, trails[:_NUM_TRAILS]], "ink", 3.4, 1.0)
        title = "clean" if t < 0 else f"t = {t:g}"
        panels.append(Panel(title, [_backdrop(lesson), *_coloured(walk.at(t), groups), *trail, heads]))
    return Figure(name, panels, len(panels))


def field_opacity(grid: Tensor, level: Level, data: Tensor) -> Tensor:
    """How much noised data there is at each grid point, 0.12 … 1, [G]: p(x_t) against its largest value, softened."""
    squares = torch.cdist(grid.double(), level.signal * data.double()).square()
    # At least the grid's own coarseness, or only arrows that start on the arm itself would show.
    density = torch.exp(-squares / (2.0 * (level.noise**2 + 0.15**2))).mean(dim=1)
    return 0.12 + 0.88 * (density / density.max()).sqrt()


def _field(lesson: Lesson) -> Figure:
    panels = []
    for t in _FIELD_STOPS:
        level = lesson.levels[t]
        arrow = level.signal * lesson.field[t] - lesson.grid
        length = arrow.norm(dim=1, keepdim=True)
        # Long arrows are drawn shorter, so that they do not cover one another; directions are kept.
        end = lesson.grid + arrow / length.clamp(min=1e-6) * 0.3 * torch.tanh(length / 0.3)
        noised = Dots(lesson.forward.at(t), "data", 1.5, 0.7)
        arrows = Arrows(lesson.grid, end, field_opacity(lesson.grid, level, lesson.data.xy))
        panels.append(Panel(f"t = {t}", [noised, arrows]))
    return Figure("field", panels, 3)


def _compass(lesson: Lesson) -> Figure:
    """Cosines over t."""
    last = len(lesson.levels) - 1
    marks: list[Mark] = []
    for height in (0.0, 0.5, 1.0):
        marks.append(Line(torch.tensor([[0.0, height], [last, height]]), "data", 1.0))
        marks.append(Text(-3.0, height, f"{height:g}", "muted", "r"))
    marks += [Text(float(t), -0.09, f"t = {t}" if t == 0 else f"{t}", "muted", "m") for t in (0, 50, 100, 150, last)]
    curves: Mapping[str, tuple[str, str]] = {
        "best_to_nearest": ("arm0", "best arrow and nearest data point"),
        "best_to_mean": ("arm4", "best arrow and mean of the data"),
        "learned_to_best": ("ink", "learned arrow and best arrow"),
    }
    for row, (name, (colour, label)) in enumerate(curves.items()):
        values = [[t, cosines[name]] for t, cosines in enumerate(lesson.directions)]
        marks.append(Line(torch.tensor(values), colour, 2.2))
        # Far enough to the left for the larger letters of narrow pages.
        y = 0.3 - 0.115 * row
        marks.append(Line(torch.tensor([[62.0, y], [69.0, y]]), colour, 2.6))
        marks.append(Text(72.0, y, label, colour))
    panel = Panel("cosine of the angle between", marks, (-14.0, last + 8.0, -0.16, 1.08), 2.6, 3)
    return Figure("directions", [panel], 3)


def _classes(lesson: Lesson) -> Figure:
    panels = []
    shown = {"data": (lesson.data.xy[::2], lesson.data.labels[::2])}
    for scale, samples in lesson.classes.items():
        shown["without guidance" if scale == 1.0 else f"guidance {scale:g}"] = (samples, lesson.labels)
    for title, (xy, labels) in shown.items():
        dots = [Dots(xy[labels == i], _CLASS_COLOURS[i], 2.1) for i in range(NUM_CLASSES)]
        panels.append(Panel(title, [_backdrop(lesson), *dots]))
    return Figure("guidance", panels, 3)
