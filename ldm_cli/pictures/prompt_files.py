"""Prompts from a file: text in kohya's line syntax, JSON Lines, or CSV with a header."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ldm_cli.errors import DataError, InputNotFoundError
from ldm_cli.pictures.job import PromptEntry, value_of

_MOST_BYTES = 2**28
_OPTION = re.compile(r"\s--(\w+)(?=\s|$)")
# The options of a line as kohya's sd-scripts have them.
_LINE_OPTIONS = {
    "n": "negative",
    "w": "width",
    "h": "height",
    "d": "seed",
    "s": "steps",
    "l": "guidance.scale",
    "ss": "sampler",
}
_ALIASES = {
    "negative_prompt": "negative",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance.scale",
    "cfg_scale": "guidance.scale",
    "scale": "guidance.scale",
    "guidance": "guidance.scale",
    "num_images_per_prompt": "images_per_prompt",
}
_SAMPLER_ALIASES = {"k_euler": "euler", "euler_a": "euler_ancestral", "k_euler_a": "euler_ancestral"}
_TEXTS = {"prompt", "negative"}


def read_prompt_file(path: Path, warn: Callable[[str], None]) -> list[PromptEntry]:
    """The prompts of a file, each with settings of its own.

    `.jsonl` holds an object per line, `.csv` a row per prompt under a header; their fields are `prompt` and those of
    `sampling`. Anything else holds a prompt per line, which may end with kohya's options: `a cat --n dog --s 30 --d 1`.
    Blank lines are skipped, in text files those that begin with `#` too.

    Args:
        path: the file.
        warn: hears of lines that are not UTF-8.

    Raises:
        InputNotFoundError: the file cannot be read.
        DataError: a line cannot be understood.
    """
    try:
        data = path.expanduser().read_bytes()
    except OSError as error:
        raise InputNotFoundError(f"cannot read prompts '{path}'", (error.strerror or "").lower()) from None
    if len(data) > _MOST_BYTES:
        raise DataError(f"cannot read prompts '{path}'", f"{len(data):,} bytes are no list of prompts")
    lines = list(_lines(path, data, warn))
    read = {".jsonl": _from_json, ".csv": _from_csv}.get(path.suffix.lower(), _from_text)
    return list(read(path, lines))


def _lines(path: Path, data: bytes, warn: Callable[[str], None]) -> Iterator[str]:
    """Lines without their ends; what is not UTF-8 becomes U+FFFD."""
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            warn(f"'{path}' line {number} is not UTF-8: what cannot be read becomes U+FFFD")
            text = raw.decode("utf-8", "replace")
        yield text.removesuffix("\r")


def _from_text(path: Path, lines: list[str]) -> Iterator[PromptEntry]:
    for number, line in enumerate(lines, start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield _line_entry(line.strip(), f"'{path}' line {number}")


def _line_entry(line: str, where: str) -> PromptEntry:
    found = list(_OPTION.finditer(line))
    prompt = line[: found[0].start()] if found else line
    ends = [match.start() for match in found[1:]] + [len(line)] * bool(found)
    sampling: dict[str, Any] = {}
    for match, end in zip(found, ends, strict=True):
        field, text = _LINE_OPTIONS.get(match[1]), line[match.end() : end].strip()
        if field is None:
            known = ", ".join(f"--{name}" for name in _LINE_OPTIONS)
            remedy = f"known are {known}; a prompt with '--' in it can stand in a .jsonl file"
            raise DataError(f"{where}: unknown option --{match[1]}", remedy=remedy)
        sampling[field] = _value(field, text)
    return PromptEntry(prompt=prompt.strip(), sampling=sampling)


def _from_json(path: Path, lines: list[str]) -> Iterator[PromptEntry]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"'{path}' line {number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON", str(error)) from None
        if not isinstance(fields, dict):
            raise DataError(f"{where}: an object expected", remedy='write {"prompt": "…", "steps": 30}')
        yield _entry(fields, where)


def _from_csv(path: Path, lines: list[str]) -> Iterator[PromptEntry]:
    csv.field_size_limit(_MOST_BYTES)
    reader = csv.DictReader(f"{line}\n" for line in lines)
    for row in reader:
        where = f"'{path}' line {reader.line_num}"
        if None in row:
            raise DataError(f"{where}: more fields than the header", remedy="put a prompt with commas in quotes")
        fields = {name.strip(): text for name, text in row.items() if text}
        yield _entry({name: _value(_ALIASES.get(name, name), text) for name, text in fields.items()}, where)


def _entry(fields: Mapping[str, Any], where: str) -> PromptEntry:
    named = {_ALIASES.get(name, name): value for name, value in fields.items()}
    prompt = named.pop("prompt", None)
    if not isinstance(prompt, str):
        raise DataError(f"{where}: no text under 'prompt'", f"its fields are {', '.join(fields) or 'none'}")
    # Lone surrogates, which JSON can spell, are no text.
    return PromptEntry(prompt=prompt.encode("utf-8", "replace").decode(), sampling=named)


def _value(field: str, text: str) -> Any:
    """A word of a line or a cell as the field wants it."""
    if field == "sampler":
        return _SAMPLER_ALIASES.get(text, text)
    return text if field in _TEXTS else value_of(text)
