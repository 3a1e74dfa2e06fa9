"""The words for synthetic scenes and the geometry or colour of each.

Lengths are fractions of the image side, x to the right and y down, both in [0, 1]. The code that draws, describes or
reads scenes takes its numbers from here.
"""

from __future__ import annotations

import math

from ldm_cli.errors import UsageError

Color = tuple[int, int, int]
Point = tuple[float, float]

COLORS: dict[str, Color] = {
    "red": (205, 30, 45),
    "orange": (243, 125, 15),
    "yellow": (250, 220, 40),
    "green": (30, 140, 60),
    "cyan": (0, 185, 205),
    "blue": (35, 70, 210),
    "purple": (125, 40, 165),
    "pink": (240, 75, 170),
}
"""sRGB of each object colour."""

NEW_COLORS: dict[str, Color] = {"maroon": (118, 10, 48)}
"""Colours that scenes have only if they are asked for: something new to teach a model that knows the others."""

BACKGROUNDS: dict[str, Color] = {
    "white": (255, 255, 255),
    "black": (20, 20, 24),
    "gray": (150, 150, 150),
    "beige": (235, 222, 190),
}
"""sRGB of each background; every one is at least 100 away from every object colour (Euclidean, of 441)."""

SIZES: dict[str, tuple[float, float]] = {
    "small": (0.185, 0.195),
    "medium": (0.23, 0.245),
    "large": (0.295, 0.315),
}
"""Least and greatest radius of each size; a gap between two sizes makes them unambiguous."""

COLUMNS: dict[str, float] = {"left": 0.35, "center": 0.5, "right": 0.65}
ROWS: dict[str, float] = {"top": 0.35, "middle": 0.5, "bottom": 0.65}
"""Mean x of the columns and mean y of the rows."""

PLACE_JITTER = 0.02
"""An object's centre is at most this far, in x and in y, from the point of its place."""

PLACES: dict[str, Point] = {
    f"{row} {column}" if (row != "middle" and column != "center") else (column if row == "middle" else row): (
        x,
        y,
    )
    for row, y in ROWS.items()
    for column, x in COLUMNS.items()
}
"""Mean centre of each place: "top left", "top", "top right", "left", "center", …"""

RELATIONS: dict[str, Point] = {
    "left of": (-1.0, 0.0),
    "right of": (1.0, 0.0),
    "above": (0.0, -1.0),
    "below": (0.0, 1.0),
}
"""Direction from the second object to the first."""

PAIR_DISTANCE = 0.25
"""In a scene of two, each centre is this far from the image's middle along the relation's axis."""
PAIR_JITTER = 0.01
"""Largest deviation from `PAIR_DISTANCE` along the axis."""
PAIR_DRIFT = 0.12
"""Across the axis, both objects move together by at most this much, and each alone by at most `PAIR_OWN_DRIFT`."""
PAIR_OWN_DRIFT = 0.03


def _circle(radius: float, num_points: int = 64) -> tuple[Point, ...]:
    angles = (2 * math.pi * i / num_points for i in range(num_points))
    return tuple((radius * math.cos(a), radius * math.sin(a)) for a in angles)


def _centered(points: list[Point], half_extent: float) -> tuple[Point, ...]:
    """The outline with its bounding box centred and scaled to a longer half-side of `half_extent`."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x0, y0 = (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2
    scale = 2 * half_extent / max(max(xs) - min(xs), max(ys) - min(ys))
    return tuple(((x - x0) * scale, (y - y0) * scale) for x, y in points)


def _star(inner: float) -> list[Point]:
    spokes = ((1.0 if i % 2 == 0 else inner, math.pi * i / 5) for i in range(10))
    return [(r * math.sin(a), -r * math.cos(a)) for r, a in spokes]


_ARM = 0.33
SHAPES: dict[str, tuple[tuple[Point, ...], ...]] = {
    "circle": (_circle(1.0),),
    "square": (((-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)),),
    "triangle": (_centered([(0.0, -0.9), (1.0, 0.9), (-1.0, 0.9)], 1.05),),
    "star": (_centered(_star(0.42), 1.05),),
    "cross": (
        (
            *((-_ARM, -1.0), (_ARM, -1.0), (_ARM, -_ARM), (1.0, -_ARM), (1.0, _ARM), (_ARM, _ARM)),
            *((_ARM, 1.0), (-_ARM, 1.0), (-_ARM, _ARM), (-1.0, _ARM), (-1.0, -_ARM), (-_ARM, -_ARM)),
        ),
    ),
    "ring": (_circle(1.0), _circle(0.55)),
}
"""Outline polygons at radius 1 with a centred bounding box; the first is filled, a second is a hole. Any two differ
clearly even at a width of 10 pixels."""

MAX_EXTENT = 1.05
"""No outline reaches farther than this from the centre, in x or in y."""

COLOR_NAMES, SHAPE_NAMES, SIZE_NAMES = tuple(COLORS), tuple(SHAPES), tuple(SIZES)
BACKGROUND_NAMES, PLACE_NAMES, RELATION_NAMES = tuple(BACKGROUNDS), tuple(PLACES), tuple(RELATIONS)

HELD_OUT_PAIRS: frozenset[tuple[str, str]] = frozenset(
    (shape, COLOR_NAMES[(3 * i + 1) % len(COLOR_NAMES)]) for i, shape in enumerate(SHAPE_NAMES)
)
"""(shape, colour) pairs that never occur in `train`: 6 of 48, each shape once and no colour twice, so that training
shows every shape and every colour, and only the combination is new."""
NEW_PAIRS: tuple[tuple[str, str], ...] = tuple((shape, color) for color in NEW_COLORS for shape in SHAPE_NAMES)
"""Every shape in every new colour."""
SEEN_PAIRS: tuple[tuple[str, str], ...] = tuple(
    (shape, color) for shape in SHAPE_NAMES for color in COLOR_NAMES if (shape, color) not in HELD_OUT_PAIRS
)
"""The other 42 pairs, in a fixed order."""


def pairs_with(only: str) -> list[tuple[str, str]]:
    """The (shape, colour) pairs that `color=NAME` or `shape=NAME` selects, for any split.

    Raises:
        UsageError: there is no such colour or shape.
    """
    kind, _, name = only.partition("=")
    column = {"shape": 0, "color": 1}.get(kind, 2)
    pairs = NEW_PAIRS if name in NEW_COLORS else (*SEEN_PAIRS, *sorted(HELD_OUT_PAIRS))
    found = [pair for pair in pairs if name in pair[column : column + 1]]
    if not found:
        colors = ", ".join((*COLORS, *NEW_COLORS))
        known = f"color is one of {colors}; shape of {', '.join(SHAPES)}"
        raise UsageError(f"there are no scenes with '{only}'", known, "give color=NAME or shape=NAME")
    return found
