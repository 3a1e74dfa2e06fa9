"""The figures of the lesson. Each has a caption in English and in Chinese that says what to see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from ldm_cli.core.diffusion.process import Level
from ldm_cli.lesson.experiment import Lesson, Walk
from ldm_cli.lesson.spiral import NUM_CLASSES, nearest
from ldm_cli.plots.panels import LIGHT, Panel, dots, line

NUM_COLOURS = 6
_CLASS_COLOURS = ("arm0", "arm3", "arm5")
_STOPS = (-1.0, 20.0, 50.0, 100.0, 199.0)
_FIELD_STOPS = (199, 100, 60, 30, 15, 5)
_NUM_TRAILS = 4
_VIEW = (-2.6, 2.6)
# All lengths are in units of the data. Without a clip path for each arrow, the SVG is a tenth smaller.
_ARROWS: Any = {
    "angles": "xy",
    "units": "xy",
    "scale_units": "xy",
    "scale": 1.0,
    "clip_on": False,
    "width": 0.021,
    "headwidth": 4.0,
    "headlength": 4.5,
    "headaxislength": 4.5,
    "minshaft": 1.7,
    "minlength": 0.5,
}


@dataclass(frozen=True)
class Text:
    """The same text in two languages."""

    english: str
    chinese: str


@dataclass(frozen=True)
class LessonFigure:
    """Panels in rows of `columns`, with a title and a caption. `name` is unique and names the PNG file."""

    name: str
    panels: Sequence[Panel]
    columns: int
    title: Text
    caption: Text


_TITLES = {
    "forward": Text("Forward: every point walks into noise", "前向：每个点都随机走进噪声"),
    "field": Text("The learned field: to the mean first, to the data last", "学到的向量场：先指向均值，后指向数据"),
    "directions": Text("The same in numbers", "同一件事，用数字说"),
    "ddpm": Text("DDPM: step towards the data, and add noise again", "DDPM：朝数据走一步，再加回一点噪声"),
    "ddpm-without-noise": Text("DDPM without its noise: everything collapses", "去掉噪声的 DDPM：全部塌缩"),
    "ddim": Text("DDIM: no noise, shorter steps, the same field", "DDIM：不加噪声、步子更短，用的是同一个向量场"),
    "guidance": Text("Classes, without and with guidance", "按类别采样：无引导与有引导"),
}
_CAPTIONS = {
    "forward": Text(
        "Every step adds a little noise. After 200 steps, no point shows where on the spiral it began.",
        "每一步都加入一点噪声；200 步之后，从这团点里再也看不出每个点原来在螺旋的哪个位置。",
    ),
    "field": Text(
        "Each arrow points to the clean point that the network predicts: the mean of all data in strong noise, the "
        "nearest part of the arm in weak noise. Arrows are faint where noised data are rare.",
        "箭头指向网络所认为的干净点：噪声强时指向全部数据的均值，噪声弱时指向最近的那段螺旋；"
        "颜色浅的箭头处几乎没有加噪数据。",
    ),
    "directions": Text(
        "The best possible arrow, computed from the data in closed form, turns from the mean (right) to the nearest "
        "data point (left) as noise fades. The learned arrow follows it.",
        "由数据直接算出的最优箭头，随噪声减弱，从指向均值（右端）转为指向最近的数据点（左端），而学到的箭头跟着它走。",
    ),
    "ddpm": Text(
        "Every step goes towards the prediction and adds fresh noise. Colours stay mixed for long, and the points end "
        "all along the spiral, as the data do.",
        "每一步先走向预测，再加入新的噪声，所以各色的点混合了很久，最后像数据一样铺满整条螺旋。",
    ),
    "ddpm-without-noise": Text(
        "The same steps go too far without their noise: all points fall into the middle, and move together to the "
        "inner edge of the spiral as noise fades.",
        "同样的步子，却少了本该加回的噪声，就走过了头：所有点都落到中间，随着噪声减弱，又一起挪到螺旋的内缘。",
    ),
    "ddim": Text(
        "The steps of DDIM have the right length for sampling without noise. They fold the noise cloud into the spiral "
        "without mixing: neighbours in colour were neighbours in the noise.",
        "DDIM 按“不加噪声”取恰当的步长，把噪声云不经混合地折叠成螺旋：终点相邻（同色）的点，起点也相邻。",
    ),
    "guidance": Text(
        "Given a class, the network generates points of that class, overlaps included. Guidance pushes them away from "
        "the prediction without a class, and each class shrinks to the part that no other class shares.",
        "给定类别，网络画出该类的样子，连与邻类的重叠也一起画出；引导则把样本推离“不给类别也会画的东西”，"
        "于是每一类都收缩到只属于自己的部分。",
    ),
}


def lesson_figures(lesson: Lesson) -> list[LessonFigure]:
    """All figures, in the order of the lesson."""
    ddpm, quiet, ddim = (lesson.backward[name] for name in ("ddpm", "quiet", "ddim"))
    return [
        _figure("forward", _walk_panels(lesson, lesson.forward, lesson.forward.stops[0], _STOPS), 5),
        _figure("field", [Panel(f"t = {t}", partial(_draw_field, lesson, t)) for t in _FIELD_STOPS], 3),
        _figure("directions", [Panel("cosine of the angle between", partial(_draw_cosines, lesson), (932, 358))], 1),
        _figure("ddpm", _walk_panels(lesson, ddpm, ddpm.end, _STOPS[::-1]), 5),
        _figure("ddpm-without-noise", _walk_panels(lesson, quiet, quiet.end, _STOPS[::-1]), 5),
        _figure("ddim", _walk_panels(lesson, ddim, ddim.end, _STOPS[::-1]), 5),
        _figure("guidance", _class_panels(lesson), 3),
    ]


def _figure(name: str, panels: Sequence[Panel], columns: int) -> LessonFigure:
    return LessonFigure(name, panels, columns, _TITLES[name], _CAPTIONS[name])


def colour_groups(end: Tensor) -> Tensor:
    """Number 0 … 5 of each point's colour, by its place on the arm, int64 [N]."""
    return (nearest(end)[0] * NUM_COLOURS).long().clamp(max=NUM_COLOURS - 1)


def _draw_data(axes: Axes, lesson: Lesson) -> None:
    """The data set, which lies in order along the arm, as a pale line behind everything else."""
    axes.set(xlim=_VIEW, ylim=_VIEW)
    line(axes, lesson.data.xy[::5], "data", 2.6, 0.55)


def _walk_panels(lesson: Lesson, walk: Walk, coloured_by: Tensor, stops: tuple[float, ...]) -> list[Panel]:
    """The points at these times, and the paths of a few of them up to then."""
    groups = colour_groups(coloured_by)
    followed = [int(torch.nonzero(groups == i)[0, 0]) for i in range(NUM_COLOURS) if bool((groups == i).any())]

    def draw(stop: int, axes: Axes) -> None:
        _draw_data(axes, lesson)
        for i in range(NUM_COLOURS):
            dots(axes, walk.stops[stop, groups == i], f"arm{i}", 2.1, 0.85)
        for i in followed[:_NUM_TRAILS]:
            line(axes, walk.stops[: stop + 1, i], "ink", 1.0, 0.4)
        dots(axes, walk.stops[stop, followed[:_NUM_TRAILS]], "ink", 3.4, 1.0)

    return [Panel("clean" if t < 0 else f"t = {t:g}", partial(draw, walk.index(t))) for t in stops]


def field_opacity(grid: Tensor, level: Level, data: Tensor) -> Tensor:
    """Opacity of the arrow at each grid point, 0.12 … 1, [G]: the softened density p(x_t) over its largest value."""
    squares = torch.cdist(grid.double(), level.signal * data.double()).square()
    # Without the width of a grid cell, only arrows that start on the arm itself would show.
    density = torch.exp(-squares / (2.0 * (level.noise**2 + 0.15**2))).mean(dim=1)
    return 0.12 + 0.88 * (density / density.max()).sqrt()


def _draw_field(lesson: Lesson, t: int, axes: Axes) -> None:
    level, grid = lesson.levels[t], lesson.grid.double()
    axes.set(xlim=_VIEW, ylim=_VIEW)
    dots(axes, lesson.forward.at(t), "data", 1.5, 0.7)
    arrow = level.signal * lesson.field[t] - grid
    length = arrow.norm(dim=1, keepdim=True)
    # Long arrows are shortened, so that they do not cover one another; directions are kept.
    (x, y), (u, v) = grid.T.tolist(), (arrow / length.clamp(min=1e-6) * 0.3 * torch.tanh(length / 0.3)).T.tolist()
    opacity = [round(value, 2) for value in field_opacity(grid, level, lesson.data.xy).tolist()]
    colours = [(LIGHT["arrow"], value) for value in opacity]
    axes.quiver(x, y, u, v, color=colours, zorder=3, **_ARROWS)


def _draw_cosines(lesson: Lesson, axes: Axes) -> None:
    """The cosines of `measures.directions` over t."""
    curves = {
        "best_to_nearest": ("arm0", "best arrow and nearest data point"),
        "best_to_mean": ("arm4", "best arrow and mean of the data"),
        "learned_to_best": ("ink", "learned arrow and best arrow"),
    }
    last = len(lesson.levels) - 1
    for name, (colour, label) in curves.items():
        values = [[t, cosines[name]] for t, cosines in enumerate(lesson.directions)]
        line(axes, torch.tensor(values), colour, 2.2, label=label)
    axes.set(xlim=(-14, last + 8), ylim=(-0.16, 1.08), yticks=(0.0, 0.5, 1.0), xticks=(0, 50, 100, 150, last))
    axes.set(xticklabels=("t = 0", "50", "100", "150", f"{last}"), yticklabels=("0", "0.5", "1"))
    # The page enlarges the text on narrow screens: labels lie inside the panel, and the legend's lines far apart.
    axes.tick_params(axis="x", length=0, pad=-26, labelsize=14, labelcolor=LIGHT["muted"])
    axes.tick_params(axis="y", length=0, pad=-44, labelsize=14, labelcolor=LIGHT["muted"])
    axes.hlines((0.0, 0.5, 1.0), 0, last, colors=LIGHT["data"], linewidth=1.0, zorder=1)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0.33, 0.12),
        frameon=False,
        fontsize=14,
        labelspacing=1.3,
        labelcolor="linecolor",
    )


def _class_panels(lesson: Lesson) -> list[Panel]:
    """The data and the samples of each guidance scale, coloured by class."""

    def draw(xy: Tensor, labels: Tensor, axes: Axes) -> None:
        _draw_data(axes, lesson)
        for i in range(NUM_CLASSES):
            dots(axes, xy[labels == i], _CLASS_COLOURS[i], 2.1, 0.85)

    panels = [Panel("data", partial(draw, lesson.data.xy[::2], lesson.data.labels[::2]))]
    for scale, samples in lesson.classes.items():
        title = "without guidance" if scale == 1.0 else f"guidance {scale:g}"
        panels.append(Panel(title, partial(draw, samples, lesson.labels)))
    return panels
