"""Captions and labels out of a sample's text and JSON members."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from ldm_cli.data.bad_samples import BadSampleError

MAX_CAPTION_LENGTH = 10_000
"""Characters of a caption that are kept; no tokenizer reads as many."""

# C0 and C1 controls, and the marks that reorder the text around them. Joiners stay: emoji and many scripts
# need them.
_UNWANTED = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]+")


class Text(NamedTuple):
    """Decoded text.

    Attributes:
        text: the text.
        remarks: what had to be done to it, by which it is counted: "Latin-1 caption", "long caption", …
    """

    text: str
    remarks: tuple[str, ...]


def decode_text(data: bytes) -> Text:
    """UTF-8, with or without a byte-order mark; bytes that are not UTF-8 are read as Latin-1."""
    try:
        return Text(data.decode("utf-8-sig"), ())
    except UnicodeDecodeError:
        return Text(data.decode("latin-1"), ("Latin-1 caption",))


def clean_caption(text: str) -> Text:
    """Control characters, line breaks and bidi overrides become spaces, the ends are stripped, and the length
    is bounded.
    """
    cleaned = _UNWANTED.sub(" ", text.strip())
    remarks = ("control characters in caption",) if cleaned != text.strip() else ()
    cleaned = cleaned.strip()
    if len(cleaned) > MAX_CAPTION_LENGTH:
        return Text(cleaned[:MAX_CAPTION_LENGTH], (*remarks, "long caption"))
    return Text(cleaned, remarks)


def parse_json(data: bytes) -> dict[str, Any]:
    """The object in a JSON member.

    Raises:
        BadSampleError: "damaged json".
    """
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BadSampleError("damaged json", str(error)) from error
    if not isinstance(value, dict):
        raise BadSampleError("damaged json", f"an object is expected, found {type(value).__name__}")
    return value


def field_of(metadata: dict[str, Any], path: str) -> Any:
    """The value at `path`: a key, or keys joined by dots; None where there is none."""
    if path in metadata:
        return metadata[path]
    value: Any = metadata
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def caption_candidates(value: Any) -> list[str]:
    """The captions in a JSON value that are not blank: text itself, or each of a list of texts."""
    texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return [text for text in texts if isinstance(text, str) and text.strip()]


def choose_caption(value: Any, choice: float) -> str | None:
    """The caption in a JSON value: text itself, or one of a list of texts.

    Args:
        value: text, a list of texts, or anything else, which is no caption.
        choice: in [0, 1): which of a list's texts that are not blank.

    Returns:
        None if there is no text that is not blank.
    """
    candidates = caption_candidates(value)
    return candidates[int(choice * len(candidates))] if candidates else None


def parse_label(value: Any) -> int:
    """A class index from text or a JSON number.

    Raises:
        BadSampleError: "missing label" or "bad label".
    """
    if value is None:
        raise BadSampleError("missing label")
    try:
        label = int(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else -1
    except ValueError:
        label = -1
    if not 0 <= label < 2**63:
        raise BadSampleError("bad label", f"a class index is expected, found {value!r:.80}")
    return label
