"""Prompts of any length as chunks that a text encoder takes one by one, their states side by side.

The rule is that of AUTOMATIC1111's web interface: a full chunk ends after its last comma, if that is among its last 20
tokens, and what follows the comma goes into the next chunk; `BREAK` ends a chunk wherever it stands.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ldm_cli.data.tokenizer import Tokenizer, defused
from ldm_cli.families.prompt_weights import WeightedText, parse_weights

BREAK = re.compile(r"\s*\bBREAK\b\s*")
_MOST_MOVED = 20


@dataclass(frozen=True)
class PromptReading:
    """How prompts become conditions.

    Attributes:
        weighted: whether `(word:1.3)` is a weight.
        long: whether a prompt may be several chunks, and `BREAK` begins one.
        clip_skip: which layer of CLIP's text towers gives the states, counted from the last one, which is 1; None: the
            one that the model was made for.
    """

    weighted: bool = False
    long: bool = False
    clip_skip: int | None = None


class Token(NamedTuple):
    """A token of a prompt, how much it counts, and where it begins in the text of all `pieces_of` the prompt."""

    id: int
    weight: float
    start: int


@dataclass(frozen=True)
class TokenRow:
    """A prompt as a text tower takes it.

    Attributes:
        ids: of n chunks of L tokens each: start, text, end, padding.
        weights: how much each counts.
        cut: the text that found no room.
    """

    ids: list[int]
    weights: list[float]
    cut: str

    @classmethod
    def of(cls, prompt: str, tokenizer: Tokenizer, length: int, reading: PromptReading, num_chunks: int) -> TokenRow:
        """The row of a prompt in `num_chunks` chunks of `length` tokens: its own, then empty ones."""
        chunks = chunks_of(prompt, tokenizer, length - 2, reading)
        text = "".join(piece.text for piece in pieces_of(prompt, reading))
        cut = next((text[token.start :] for chunk in chunks[num_chunks:] for token in chunk), "")
        ids: list[int] = []
        weights: list[float] = []
        for chunk in [*chunks, *[[]] * num_chunks][:num_chunks]:
            padding = length - 2 - len(chunk)
            own = [token.id for token in chunk]
            ids += [tokenizer.start_id, *own, tokenizer.end_id, *[tokenizer.pad_id] * padding]
            weights += [1.0, *(token.weight for token in chunk), *[1.0] * (1 + padding)]
        return cls(ids, weights, cut)


def pieces_of(prompt: str, reading: PromptReading) -> list[WeightedText]:
    """The texts of a prompt that are encoded, each with its weight."""
    pieces = parse_weights(prompt) if reading.weighted else [WeightedText(prompt, 1.0)]
    return [WeightedText(defused(piece.text), piece.weight) for piece in pieces]


def chunks_of(prompt: str, tokenizer: Tokenizer, room: int, reading: PromptReading) -> list[list[Token]]:
    """The tokens of a prompt in chunks, one at least; one after each `room` tokens if the prompt is not `long`.

    Args:
        prompt: the text.
        room: most tokens of a chunk, without its start and end.
        reading: `weighted` and `long`.
    """
    pieces = pieces_of(prompt, reading)
    if not reading.long:
        tokens = [token for token in _tokens(pieces, tokenizer, None) if token is not None]
        return [tokens[start : start + room] for start in range(0, max(1, len(tokens)), room)]
    return divided(_tokens(pieces, tokenizer, BREAK), room, tokenizer.pieces(",")[0][0])


def divided(tokens: Iterable[Token | None], room: int, comma: int) -> list[list[Token]]:
    """Tokens in chunks of at most `room`; None stands for `BREAK`. The last one is empty only if it is the only one.

    Args:
        tokens: of a prompt.
        room: most tokens of a chunk.
        comma: id of the token after which a full chunk may end.
    """
    chunks: list[list[Token]] = [[]]
    place: int | None = None  # of the last comma in the last chunk
    for token in tokens:
        chunk = chunks[-1]
        is_full = len(chunk) == room
        if token is None:
            chunks.append([])
        elif is_full and token.id != comma and place is not None and room - place <= _MOST_MOVED:
            chunks[-1:] = [chunk[: place + 1], [*chunk[place + 1 :], token]]
        elif is_full:
            chunks.append([token])
        else:
            place = len(chunk) if token.id == comma else place
            chunk.append(token)
            continue
        place = None
    return chunks if chunks[-1] or len(chunks) == 1 else chunks[:-1]


def _tokens(
    pieces: Sequence[WeightedText], tokenizer: Tokenizer, divider: re.Pattern[str] | None
) -> Iterator[Token | None]:
    """The tokens of a prompt's pieces, and None between parts that `divider` separates."""
    before = 0
    for text, weight in ((piece.text, piece.weight) for piece in pieces):
        start = 0
        for found in [*(divider.finditer(text) if divider else ()), None]:
            part = text[start : found.start() if found else len(text)]
            yield from (Token(token, weight, before + start + place) for token, place in tokenizer.pieces(part))
            if found:
                yield None
                start = found.end()
        before += len(text)
