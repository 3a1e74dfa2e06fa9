"""Sentences about synthetic scenes. All name every shape and colour, some name every attribute."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Draw = Callable[[Sequence[Any]], Any]
"""Picks one element of a sequence at random."""

FULL_FRACTION = 0.1
"""Fraction of captions that state every attribute of the scene. If all captions of a batch differed by place, size and
background, CLIP would be slow to learn the shapes."""

_OPENINGS = ("", "", "", "a picture of ", "a drawing of ", "there is ")

# {thing} carries colour and shape, with the size where `size` is stated.
_SINGLE_FULL = (
    "{thing} {place} on a {background} background",
    "{thing} on a {background} background {place}",
    "{place} on a {background} background, {thing}",
    "{place}, {thing} on a {background} background",
)
_SINGLE_PARTIAL: tuple[tuple[frozenset[str], str], ...] = (
    *(24 * ((frozenset(), "{thing}"),)),
    (frozenset({"size"}), "{thing}"),
    (frozenset({"place"}), "{thing} {place}"),
    (frozenset({"background"}), "{thing} on a {background} background"),
    (frozenset({"size", "place"}), "{thing} {place}"),
    (frozenset({"size", "background"}), "{thing} on a {background} background"),
    (frozenset({"place", "background"}), "{thing} {place} on a {background} background"),
)
_PAIR_FULL = ("{first} {relation} {second} on a {background} background",)
_PAIR_PARTIAL: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"relation"}), "{first} {relation} {second}"),
    (frozenset({"relation", "size"}), "{first} {relation} {second}"),
    (frozenset({"relation", "background"}), "{first} {relation} {second} on a {background} background"),
)
_RELATION_PHRASES = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below",),
}
_SIDES = ("left", "right")


def place_phrase(place: str) -> str:
    """The place as it stands in a sentence: "at the top left", "in the center", "on the left", ….

    >>> place_phrase("center")
    'in the center'
    """
    if place == "center":
        return "in the center"
    return f"on the {place}" if place in _SIDES else f"at the {place}"


def thing_phrase(thing: Mapping[str, Any], with_size: bool) -> str:
    """The object with its article.

    >>> thing_phrase({"size": "small", "color": "orange", "shape": "ring"}, with_size=False)
    'an orange ring'
    """
    words = f"{thing['size']} {thing['color']} {thing['shape']}" if with_size else f"{thing['color']} {thing['shape']}"
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def caption(
    objects: Sequence[Mapping[str, Any]], relation: str | None, background: str, full: bool, draw: Draw
) -> tuple[str, tuple[str, ...]]:
    """A sentence about a scene of one or two objects.

    Args:
        objects: each with `shape`, `color`, `size`, `place`; two of them with a `relation` of the first to
            the second.

    Returns:
        The sentence, and the names of the attributes it states, `shape` and `color` always among them.
    """
    if relation is None:
        everything = frozenset({"size", "place", "background"})
        stated, pattern = (everything, draw(_SINGLE_FULL)) if full else draw(_SINGLE_PARTIAL)
    else:
        everything = frozenset({"size", "relation", "background"})
        stated, pattern = (everything, draw(_PAIR_FULL)) if full else draw(_PAIR_PARTIAL)
    things = [thing_phrase(thing, "size" in stated) for thing in objects]
    opening = "" if pattern.startswith("{place}") else draw(_OPENINGS)
    sentence = opening + pattern.format(
        thing=things[0],
        first=things[0],
        second=things[-1],
        place=place_phrase(objects[0]["place"]) if relation is None else "",
        relation=draw(_RELATION_PHRASES[relation]) if relation is not None else "",
        background=background,
    )
    return sentence, ("shape", "color", *sorted(stated))
