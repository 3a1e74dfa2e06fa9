"""Captions and labels out of text files, table cells and JSON values."""

from __future__ import annotations

import ast
import codecs
import io
import itertools
import json
import math
import re
import tokenize
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
        remarks: what had to be done to it, by which it is counted: "Latin-1 caption", "long caption", …
    """

    text: str
    remarks: tuple[str, ...]


_MARKS = {  # UTF-32 first: its mark begins like that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
_HIGH = bytes(range(0x80, 0x100))
NO_TEXT = frozenset(
    ("nan", "NaN", "NAN", "null", "NULL", "None", "NA", "N/A", "n/a", "<NA>", "#N/A", "[]", "[nan]", "")
)
"""Spellings of a missing text; pandas reads most of them as missing, too."""


def encoding_of(start: bytes) -> str | None:
    """The encoding of a text by its first bytes: a byte-order mark, or the zero bytes of Latin letters in UTF-16.

    None if they show neither.
    """
    for mark, encoding in _MARKS.items():
        if start.startswith(mark):
            return encoding
    num_letters = len(start) // 2
    even, odd = start[: 2 * num_letters : 2].count(0), start[1 : 2 * num_letters : 2].count(0)
    # Of a Latin letter, the high byte is zero: the even one in big-endian text, the odd one in little-endian text.
    if min(even, odd) == 0 and 2 * max(even, odd) > max(num_letters, 2):
        return "utf-16-be" if even else "utf-16-le"
    return None


def decode_text(data: bytes) -> Text:
    """Text by its byte-order mark, else as UTF-8, else as Windows-1252; all but UTF-8 gives a remark.

    Raises:
        BadSampleError: "unknown encoding": the bytes are none of these. Text of which most is not ASCII counts as that,
            because no language that is written in Windows-1252 looks so.
    """
    encoding = encoding_of(data)
    for name in (encoding,) if encoding else ("utf-8", "cp1252"):
        if name == "cp1252" and (b"\0" in data or _is_mostly_high(data)):
            continue
        try:
            text = data.decode(name)
        except UnicodeDecodeError:
            continue
        shown = "Windows-1252" if name == "cp1252" else name[:6].upper()
        return Text(text, () if name.startswith("utf-8") else (f"{shown} text",))
    raise BadSampleError("unknown encoding", f"expected UTF-8, UTF-16 or Windows-1252, found {data[:40]!r}")


def _is_mostly_high(data: bytes) -> bool:
    """Whether more than three bytes, and more than half of those that are no blanks, are not ASCII."""
    text = b"".join(data.split())
    return len(text) - len(text.translate(None, _HIGH)) > max(3, len(text) // 2)


def captions_in(value: Any) -> tuple[str, ...]:
    """The captions that a table cell, a JSON value or a text file holds.

    A list stands for several captions, also one that a cell spells as JSON or Python. Blank text, NaN and null stand
    for none.

    Raises:
        ValueError: `value` is neither text nor a list of texts.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ()
    if isinstance(value, list | tuple):
        if any(isinstance(entry, list | tuple) for entry in value):
            raise ValueError("expected text or a list of texts, found a list of lists")
        return tuple(text for entry in value for text in captions_in(entry))
    if not isinstance(value, str):
        raise ValueError(f"expected text or a list of texts, found {type(value).__name__} {value!r:.60}")
    # JSON can spell halves of characters, which no file can hold.
    text = value.strip().encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    spelled = _spelled_value(text)
    if isinstance(spelled, dict):
        raise ValueError(f"expected text or a list of texts, found a mapping {text:.60}")
    if spelled:
        return captions_in(spelled)
    return () if text in NO_TEXT else (text,)


def _spelled_value(text: str) -> dict[str, Any] | list[Any] | None:
    """The mapping or the list that a cell spells as JSON or as Python prints it; None for all other text."""
    if text[:1] + text[-1:] not in ("[]", "{}"):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return None
        if _is_printed_array(text):
            raise ValueError(f"expected text or a list of texts, found a printed array {text:.60}") from None
    return value if isinstance(value, dict | list) else None


def _is_printed_array(text: str) -> bool:
    """Whether texts follow one another without a comma, as numpy prints them: Python reads them as one text."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    kinds = [token.type for token in tokens if token.type not in (tokenize.NL, tokenize.NEWLINE)]
    return (tokenize.STRING, tokenize.STRING) in itertools.pairwise(kinds)


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
