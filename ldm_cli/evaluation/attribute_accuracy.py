"""Accuracy of the attributes that a picture of a synthetic scene shows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

from ldm_cli.evaluation.scene_detector import SeenObject, SeenScene, relation

Truth = Mapping[str, Any]
Rates = dict[str, float | int | None]

_OF_OBJECTS = ("shape", "color", "size", "place")
RATES = (*_OF_OBJECTS, "background", "num_objects", "shape_and_color", "pair_shape_and_color", "relation")
"""The scores: see `score_scenes`."""


def score_scenes(found: Sequence[SeenScene], truths: Sequence[Truth], stated_only: bool = False) -> dict[str, Rates]:
    """Score scenes that were read from pictures against their ground truth.

    Args:
        found: N scenes as read.
        truths: N records as `ldm_cli.data.scenes.Scene.truth`.
        stated_only: score only attributes that the caption states, as pictures generated from captions are free in all
            others. Captions always state shapes, colours and the number of objects.

    Returns:
        For `all` scenes, and for those `seen` and `held_out` (with a shape-colour pair that training lacks):
        `num_images`, `num_single`, `num_pairs`, and the correct fraction of each of

        - `shape`, `color`, `size`, `place`: of all objects; `background`, `num_objects`: of all images;
        - `shape_and_color`: of single-object images, with correct shape and colour of the largest object;
        - `pair_shape_and_color`: of two-object images, the same for both objects;
        - `relation`: of two-object images, the same and with the objects in this relation.

        None where there is nothing to score. All attributes of a missing object count as wrong.

    Raises:
        ValueError: if the numbers of scenes and truths differ.
    """
    if len(found) != len(truths):
        raise ValueError(f"score_scenes: {len(found)} images, but {len(truths)} truths")
    marks: dict[str, list[dict[str, list[bool]]]] = {"all": [], "seen": [], "held_out": []}
    for truth, seen in zip(truths, found, strict=True):
        mark = _judge(truth, seen, stated_only)
        marks["all"].append(mark)
        marks["held_out" if truth["held_out"] else "seen"].append(mark)
    return {name: _rates(group) for name, group in marks.items()}


def _rates(marks: list[dict[str, list[bool]]]) -> Rates:
    gathered: dict[str, list[bool]] = {
        name: [right for mark in marks for right in mark.get(name, [])] for name in RATES
    }
    counts: Rates = {
        "num_images": len(marks),
        "num_single": len(gathered["shape_and_color"]),
        "num_pairs": len(gathered["pair_shape_and_color"]),
    }
    return counts | {name: sum(rights) / len(rights) if rights else None for name, rights in gathered.items()}


def _judge(truth: Truth, found: SeenScene, stated_only: bool) -> dict[str, list[bool]]:
    """Right or wrong for each score of one image: one entry per object, or one per image."""
    wanted: list[Truth] = truth["objects"]
    stated = set(truth["stated"]) if stated_only else {*_OF_OBJECTS, "background", "relation"}
    pairing, relation_right = _match(wanted, found, truth["relation"])
    mark: dict[str, list[bool]] = defaultdict(list)
    for target, candidate in zip(wanted, pairing, strict=True):
        for name in _OF_OBJECTS:
            if name in stated and target[name] is not None:
                mark[name].append(candidate is not None and getattr(candidate, name) == target[name])
    if "background" in stated:
        mark["background"].append(found.background == truth["background"])
    mark["num_objects"].append(found.num_objects == len(wanted))
    both = all(_agreement(target, candidate) == 2 for target, candidate in zip(wanted, pairing, strict=True))
    mark["shape_and_color" if len(wanted) == 1 else "pair_shape_and_color"].append(both)
    if len(wanted) == 2 and "relation" in stated:
        mark["relation"].append(both and relation_right)
    return mark


def _agreement(target: Truth, candidate: SeenObject | None) -> int:
    """Number of correct ones among shape and colour."""
    if candidate is None:
        return 0
    return sum(getattr(candidate, name) == target[name] for name in ("shape", "color"))


def _match(
    wanted: Sequence[Truth], found: SeenScene, wanted_relation: str | None
) -> tuple[tuple[SeenObject | None, ...], bool]:
    """The assignment of seen to wanted objects with the most correct shapes and colours, then the correct relation; and
    whether the relation is correct."""
    candidates: list[SeenObject | None] = [*found.objects[: len(wanted)]]
    candidates += [None] * (len(wanted) - len(candidates))

    def in_relation(order: Sequence[SeenObject | None]) -> bool:
        first, second = order[0], order[-1]
        return (
            len(order) == 2 and first is not None and second is not None and relation(first, second) == wanted_relation
        )

    def merit(order: Sequence[SeenObject | None]) -> tuple[int, bool]:
        return sum(_agreement(t, c) for t, c in zip(wanted, order, strict=True)), in_relation(order)

    best = max(permutations(candidates), key=merit)
    return best, in_relation(best)
