r"""Weighted words in a prompt: `a (red:1.3) circle`.

Only a number makes parentheses special: `(red)` is plain text, `\(red:1.3\)` too. Weights multiply when nested.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_TOKEN = re.compile(r"\\[()\\]|\(|:\s*([0-9]*\.?[0-9]+)\s*\)|\)")
MAX_WEIGHT = 10.0


@dataclass(frozen=True)
class WeightedText:
    """A piece of a prompt and how much it counts: 1 is plain."""

    text: str
    weight: float


@dataclass
class _Open:
    """A parenthesis that is not closed yet: its pieces, as if it were none."""

    pieces: list[WeightedText]


def parse_weights(prompt: str) -> list[WeightedText]:
    r"""The pieces of a prompt, neighbours of one weight joined; their texts together are the prompt that is encoded.

    >>> [(p.text, p.weight) for p in parse_weights(r"a (red:1.3) circle (or so)")]
    [('a ', 1.0), ('red', 1.3), (' circle (or so)', 1.0)]

    Weights above 10 count as 10. A parenthesis that is never closed is text.
    """
    levels, at = [_Open([])], 0
    for found in _TOKEN.finditer(prompt):
        _add(levels, prompt[at : found.start()])
        at, token = found.end(), found[0]
        if token == "(":
            levels.append(_Open([]))
        elif token.startswith("\\"):
            _add(levels, token[1])
        elif token == ")" or len(levels) == 1:
            # No number, or nothing to close: the parentheses are text.
            _close(levels, token)
        else:
            inner, weight = levels.pop().pieces, min(float(found[1]), MAX_WEIGHT)
            levels[-1].pieces += [WeightedText(p.text, p.weight * weight) for p in inner]
    _add(levels, prompt[at:])
    while len(levels) > 1:
        _close(levels, "")
    return _joined(levels[0].pieces)


def _add(levels: list[_Open], text: str) -> None:
    levels[-1].pieces.append(WeightedText(text, 1.0))


def _close(levels: list[_Open], token: str) -> None:
    """Give a level's pieces back to the one around it, its parenthesis as text."""
    if len(levels) > 1:
        inner = levels.pop().pieces
        levels[-1].pieces += [WeightedText("(", 1.0), *inner]
    _add(levels, token)


def _joined(pieces: list[WeightedText]) -> list[WeightedText]:
    joined: list[WeightedText] = []
    for piece in pieces:
        if joined and joined[-1].weight == piece.weight:
            joined[-1] = WeightedText(joined[-1].text + piece.text, piece.weight)
        elif piece.text:
            joined.append(piece)
    return joined or [WeightedText("", 1.0)]
