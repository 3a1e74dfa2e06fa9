"""Prompts from a file: text in kohya's line syntax, JSON, JSON Lines, or CSV and TSV with a header."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ldm_cli.config import causes
from ldm_cli.data.captions import NO_TEXT
from ldm_cli.data.tables import place_in, rows_of, text_lines
from ldm_cli.errors import DataError, amount
from ldm_cli.inputs import open_input
from ldm_cli.pictures.job import PromptEntry, value_of
from ldm_cli.sampling.sampler_names import sampler_called

_MOST_BYTES = 2**26
_TEXT_SUFFIXES = ("", ".txt", ".text", ".prompt", ".prompts")
_OPTION = re.compile(r"(?:^|\s)--(\w+)(?=\s|=|$)")
# What a text file of prompts does not begin with, and its kind.
_OTHER_KINDS = {
    "markup": re.compile(r"\s*(\{\\rtf|<!|<html|<svg|<\?|%PDF|%!PS)", re.IGNORECASE),
    "YAML: write it as .json": re.compile(r"(---|prompts?\s*:.*)\s*$", re.IGNORECASE),
    "a Git LFS pointer: fetch the file itself": re.compile(r"version https://git-lfs"),
}
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
# The settings of a picture, as web interfaces write them below its prompt.
_SETTINGS = re.compile(r"Negative prompt:|Steps: \d+, ")
# Two hyphens before any word; before kohya's options also one, or a dash that a text program made of two.
_STRAY_OPTION = re.compile(r"(?:^|\s)(?:--[A-Za-z][\w-]*|[-\u2013\u2014](?:[nwhdsl]|ss|seed|steps|cfg|ar))[ =]+\S+")
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
_TEXTS = {"prompt", "negative"}


def read_prompt_file(path: Path, warn: Callable[[str], None]) -> list[PromptEntry]:
    """The prompts of a file, each with settings of its own.

    `.json` holds a list of prompts or objects, also under the key `prompts`; `.jsonl` an object per line; `.csv` and
    `.tsv` a row per prompt under a header; their fields are `prompt` and those of `sampling`. A text file holds a
    prompt per line, which may end with kohya's options: `a cat --n dog --s 30 --d 1`; blank lines and those that begin
    with `#` are skipped.

    Args:
        warn: receives a warning of text that is not UTF-8, and one of words that look like options.

    Raises:
        InputNotFoundError: the file cannot be read.
        DataError: it is of another kind, or a line cannot be understood.
    """
    suffix = path.suffix.lower()
    readers = {".json": _from_json, ".jsonl": _from_rows, ".ndjson": _from_rows, ".csv": _from_rows, ".tsv": _from_rows}
    if suffix not in readers and suffix not in _TEXT_SUFFIXES:
        kinds = ", ".join((*_TEXT_SUFFIXES[1:], *readers))
        raise DataError(f"cannot read prompts '{path}'", f"{suffix} is no kind of prompt file", f"known are {kinds}")
    remarks: Counter[str] = Counter()

    def remark(what: str) -> None:
        remarks[what] += 1

    with open_input(path, remedy="check --prompts") as stream:
        if (size := os.fstat(stream.fileno()).st_size) > _MOST_BYTES:
            raise DataError(f"cannot read prompts '{path}'", f"{amount(size)} are no list of prompts")
    found = list(readers.get(suffix, _from_text)(path, remark))
    for what, count in remarks.items():
        warn(f"'{path}': {count} × {what}")
    if stray := next((entry.prompt for entry in found if stray_option(entry.prompt)), None):
        warn(
            f"'{path}': '{stray_option(stray)}' is part of the prompt '{stray}': options begin with '--', in text files"
        )
    return found


def stray_option(prompt: str) -> str | None:
    """The first words of a prompt that look like an option, such as `-w 64`; None if there are none."""
    found = _STRAY_OPTION.search(prompt)
    return found[0].strip() if found else None


def _from_text(path: Path, remark: Callable[[str], None]) -> Iterator[PromptEntry]:
    lines = [line.rstrip("\r\n") for line in text_lines(path, remark)]
    _expect_lines_of_text(path, lines)
    for number, line in enumerate(lines, start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield _line_entry(line.strip(), f"{path}:{number}")


def _expect_lines_of_text(path: Path, lines: list[str]) -> None:
    """Refuse a file whose content is of another kind than its suffix says."""
    text = [line for line in lines if line.strip()]
    first = text[0] if text else ""
    cells = [cell.strip(" \"'") for cell in re.split(r"[,;|\t]", first.lower())]
    kind = next((kind for kind, start in _OTHER_KINDS.items() if start.match(first)), None)
    if any(_CONTROL.search(line) for line in text):
        kind = "no text"
    elif any(_SETTINGS.match(line) for line in text):
        kind = "the settings of a picture: keep its prompt alone"
    elif _is_json(first) or _is_json("".join(text)):
        kind = "JSON: call it .json or .jsonl"
    elif len(cells) > 1 and "prompt" in cells:
        kind = "a table with a header: call it .csv"
    if kind:
        raise DataError(f"cannot read prompts '{path}'", f"its content is {kind}")


def _is_json(text: str) -> bool:
    """Whether this is a JSON list or object; words in brackets are none."""
    try:
        return isinstance(json.loads(text), list | dict)
    except (ValueError, RecursionError):
        return False


def _line_entry(line: str, where: str) -> PromptEntry:
    found = list(_OPTION.finditer(line))
    if found and found[0].start() == 0:
        raise DataError(f"{where}: options without a prompt", f"it begins with {found[0][0].strip()}")
    prompt = line[: found[0].start()] if found else line
    ends = [match.start() for match in found[1:]] + [len(line)] * bool(found)
    sampling: dict[str, Any] = {}
    for match, end in zip(found, ends, strict=True):
        field, text = _LINE_OPTIONS.get(match[1]), line[match.end() : end].strip(" =\t")
        if field is None:
            known = ", ".join(f"--{name}" for name in _LINE_OPTIONS)
            remedy = f"known are {known}; a prompt with '--' in it can stand in a .jsonl file"
            raise DataError(f"{where}: unknown option --{match[1]}", remedy=remedy)
        sampling[field] = _value(field, text)
    return _valid_entry(prompt.strip(), sampling, where)


def _from_rows(path: Path, remark: Callable[[str], None]) -> Iterator[PromptEntry]:
    """The rows of a table, or the objects of JSON Lines."""
    is_typed = path.suffix.lower() in (".jsonl", ".ndjson")
    for where, row in rows_of(path, remark):
        where, fields = place_in(path, where), row
        if not is_typed:
            fields = {name.lower().replace(" ", "_"): text for name, text in row.items() if text not in NO_TEXT}
            fields = {name: _value(_ALIASES.get(name, name), text) for name, text in fields.items()}
        yield _entry(fields, where)


def _from_json(path: Path, remark: Callable[[str], None]) -> Iterator[PromptEntry]:
    try:
        value = json.loads("".join(text_lines(path, remark)))
    except (ValueError, RecursionError) as error:
        raise DataError(f"cannot read prompts '{path}'", f"not JSON: {error}") from None
    if isinstance(value, dict):
        value = value.get("prompts", [value])
    if not isinstance(value, list):
        raise DataError(f"cannot read prompts '{path}'", "expected a list of prompts")
    for number, entry in enumerate(value, start=1):
        if not isinstance(entry, str | dict):
            raise DataError(f"'{path}' entry {number}", "expected a prompt or an object")
        yield _entry({"prompt": entry} if isinstance(entry, str) else entry, f"'{path}' entry {number}")


def _entry(fields: Mapping[str, Any], where: str) -> PromptEntry:
    # An object is the section itself, such as `guidance`, whose name is an alias of its scale.
    named = {name if isinstance(value, dict) else _ALIASES.get(name, name): value for name, value in fields.items()}
    prompt = named.pop("prompt", None)
    if not isinstance(prompt, str):
        raise DataError(f"{where}: no text under 'prompt'", f"its fields are {', '.join(fields) or 'none'}")
    # Lone surrogates, which JSON can spell, are no text.
    return _valid_entry(prompt.encode("utf-8", "replace").decode(), named, where)


def _valid_entry(prompt: str, sampling: dict[str, Any], where: str) -> PromptEntry:
    if isinstance(name := sampling.get("sampler"), str):
        sampling["sampler"] = sampler_called(name) or name
    try:
        return PromptEntry(prompt=prompt, sampling=sampling).at_line(where)
    except ValidationError as error:
        raise DataError(f"{where}: not a setting", "; ".join(causes(error))) from None


def _value(field: str, text: str) -> Any:
    """A word of a line or a cell as the field wants it."""
    return text if field in _TEXTS else value_of(text)
