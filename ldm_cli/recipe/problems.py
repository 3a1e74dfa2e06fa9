"""The errors of pydantic in readable form: `path: expected …, found … (did you mean 'x'?)`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ldm_cli.config import did_you_mean, suggest, words_of
from ldm_cli.recipe.other_names import field_called, models_in
from ldm_cli.recipe.yaml_source import Path, dotted
from ldm_cli.sampling.sampler_names import sampler_called, schedule_called

_EXPECTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "model_type": "a mapping",
}
_BOUNDS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}
_ABSENT = object()
_FIELD_NAME = re.compile(r"(?<![\w.-])([a-z]\w*(?:\.\w+)*)(=?)(?![\w-])")
_BOOLEAN_WORDS = {"yes": "true", "on": "true", "no": "false", "off": "false"}


@dataclass(frozen=True)
class Problem:
    """A problem of a recipe: its place in the data, and a message."""

    path: Path
    message: str
    at_key: bool = False
    """The key itself is wrong, not its value."""
    missing: str = ""
    """The key that is not there."""
    meant: str = ""
    """The key of the same section for which this unknown one probably stands."""


def find_problems(error: ValidationError, model: type[BaseModel], data: Any, quoted: set[Path]) -> list[Problem]:
    """Every problem in `error`, one per place. Branches of a union are joined; a mistyped key is not also missing.

    Args:
        error: of validating `data` as `model`.
        quoted: paths of the texts that were written in quotes.
    """
    unknown, missing, invalid = [], [], dict[Path, list[ErrorDetails]]()
    for detail in error.errors(include_url=False, include_context=True):
        path = _data_path(detail["loc"], data)
        if detail["type"] == "extra_forbidden":
            unknown.append((path, detail["loc"]))
        elif detail["type"] == "missing":
            missing.append((path, detail["loc"][-1]))
        else:
            invalid.setdefault(path, []).append(detail)
    problems = []
    explained = set()
    for path, loc in unknown:
        suggestion, message = _unknown_key(path, loc, model, data)
        explained.add((path[:-1], suggestion))
        problems.append(Problem(path, message, at_key=True, meant=suggestion or ""))
    num_wanted = {path: part + 1 for path, part in missing if isinstance(part, int)}
    for path, num in num_wanted.items():
        problems.append(Problem(path, f"expected {num} entries, found {len(value_at(data, path))}"))
    problems += [
        Problem(path, f"missing required key '{name}'", at_key=True, missing=name)
        for path, name in dict.fromkeys(missing)
        if isinstance(name, str) and (path, name) not in explained
    ]
    for path, details in invalid.items():
        # Of a union, the branch whose errors lie deeper in the value is the intended one.
        if any(other[: len(path)] == path and other != path for other in invalid):
            continue
        problems.append(_invalid_value(path, details, value_at(data, path), path in quoted))
    return problems


def value_at(data: Any, path: Path) -> Any:
    """The part of nested mappings and lists at `path`."""
    for part in path:
        data = data[part]
    return data


def describe(value: Any, quoted: bool = False) -> str:
    """A value in words: `integer 3`, `text '010'`, `a list`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"{'integer' if isinstance(value, int) else 'number'} {value!r}"
    if isinstance(value, str):
        return f"{'the quoted ' if quoted else ''}text {_shortened(value)!r}"
    return f"a list of {len(value)}" if isinstance(value, list) else "a mapping"


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "…"


def _data_path(loc: tuple[str | int, ...], data: Any) -> Path:
    """pydantic's location without the names of union branches, which are not in the data."""
    path: list[str | int] = []
    for part in loc:
        inside_list = isinstance(data, list) and isinstance(part, int) and part < len(data)
        if inside_list or (isinstance(data, dict) and part in data):
            data = data[part]
            path.append(part)
    return tuple(path)


def _fields_at(loc: tuple[str | int, ...], model: type[BaseModel], section: Mapping[str, Any]) -> list[str]:
    """Names allowed beside the key at `loc`; of a union's models, the one that fits `section` best."""
    models = [model]
    for part in loc[:-1]:
        inner = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        models = [found for annotation in inner for found in models_in(annotation)] or models

    def fit(candidate: type[BaseModel]) -> int:
        fields = candidate.model_fields
        known = [name for name in section if name in fields]
        # A branch's tag is the default of one of its fields, such as `model_type`.
        return len(known) + sum(bool(section[name] == fields[name].default) for name in known)

    return list(max(models, key=fit).model_fields)


def _unknown_key(path: Path, loc: tuple[str | int, ...], model: type[BaseModel], data: Any) -> tuple[str | None, str]:
    """The key that was probably intended, and the message."""
    name = str(path[-1])
    siblings = value_at(data, path[:-1])
    known = _fields_at(loc, model, siblings)
    section = dotted(path[:-1])
    meant = field_called(name, model, section) or ""
    sibling = meant.removeprefix(f"{section}.") if meant.startswith(f"{section}.") else meant
    if meant and sibling not in known:
        return None, f"unknown key (did you mean '{meant}'?)"
    if not meant:
        sibling = suggest(name, [field for field in known if field not in siblings]) or suggest(name, known) or ""
    if sibling:
        return sibling, f"unknown key (did you mean '{sibling}'?)"
    return None, f"unknown key; expected one of {', '.join(known)}"


def _invalid_value(path: Path, details: list[ErrorDetails], value: Any, quoted: bool) -> Problem:
    failed_check = next((d for d in details if d["type"] == "value_error"), None)
    if failed_check:
        message = str(failed_check.get("ctx", {}).get("error", failed_check["msg"]))
        return Problem(_blamed_field(path, message, value), message)
    expected = " or ".join(dict.fromkeys(_expected(detail) for detail in details))
    found, words = f"found {describe(value, quoted)}", [word for detail in details for word in words_of(detail)]
    if isinstance(value, str) and (meant := _intended_word(value, words)):
        return Problem(path, f"{found}{meant}, expected {expected}")  # the list of all words may be long
    return Problem(path, f"expected {expected}, {found}{_hint(details, value, quoted)}")


def _blamed_field(path: Path, message: str, value: Any) -> Path:
    """The place of the field in the message that the recipe sets: before `=`, with `.` or `_`, or else any."""
    words = [(found[1].strip("."), found[2]) for found in _FIELD_NAME.finditer(message)]
    ranks = [[word for word, equals in words if equals], [word for word, _ in words if re.search("[._]", word)]]
    for word in [*(word for rank in ranks for word in rank), *(word for word, _ in words)]:
        part: Any = value
        for key in word.split("."):
            part = part.get(key, _ABSENT) if isinstance(part, dict) else _ABSENT
        if part is not _ABSENT:
            return (*path, *word.split("."))
    return path


def _expected(detail: ErrorDetails) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in _EXPECTED:
        return _EXPECTED[kind]
    if kind in _BOUNDS:
        word, key = _BOUNDS[kind]
        return f"{word} {context[key]:g}"
    if kind == "literal_error":
        return str(context["expected"])
    if kind == "string_pattern_mismatch":
        return f"text that matches {context['pattern']}"
    if kind in ("too_short", "too_long"):
        word, key = ("at least", "min_length") if kind == "too_short" else ("at most", "max_length")
        return f"{word} {context[key]} entries"
    return detail["msg"]


def _hint(details: list[ErrorDetails], value: Any, quoted: bool) -> str:
    kinds = {detail["type"] for detail in details}
    wants_number = not kinds.isdisjoint({"int_type", "float_type"})
    hint = ""
    if "string_type" in kinds and isinstance(value, int | float):
        hint = " (put it in quotes)"
    elif "string_type" in kinds and value is None:
        hint = ' (empty text is "")'
    elif isinstance(value, str) and wants_number and quoted:
        hint = " (remove the quotes)"
    elif isinstance(value, str) and wants_number:
        digits = value.replace("_", "").lstrip("+0")
        hint = f" (write {digits})" if re.fullmatch(r"[0-9]+", digits) else ""
    elif isinstance(value, float) and wants_number and value.is_integer():
        hint = f" (write {int(value)})"
    elif isinstance(value, str) and "bool_type" in kinds:
        word = _BOOLEAN_WORDS.get(value.lower(), value.lower())
        hint = f" (write {word})" if word in ("true", "false") else ""
    return hint


def _intended_word(value: str, words: list[str]) -> str:
    """As `did_you_mean`; of samplers also by the names that other programs have for them."""
    sampler = sampler_called(value)
    if sampler not in words:
        return did_you_mean(value, words)
    spacing = schedule_called(value)
    return f" (did you mean '{sampler}'{f' with timestep_spacing: {spacing}' if spacing else ''}?)"


def line_of(path: Path, message: str) -> str:
    """`path: message`; the recipe as a whole has no path, and a message may begin with it."""
    return f"{dotted(path)}: {message}" if path and not message.startswith(f"{dotted(path)}=") else message
