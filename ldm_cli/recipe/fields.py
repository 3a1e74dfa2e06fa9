"""What a recipe may hold, field by field: name, type, default and a line of words, all from the typed recipe."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

_WORDS = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}
_TECHNICAL = 2**20
"""Bounds from here on keep arithmetic sound, and tell nobody what to write."""
_BOUNDS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))


class FieldLine(NamedTuple):
    """A field of a recipe."""

    name: str
    """Dotted path."""
    type: str
    default: str
    """As in YAML; `required` where there is none."""
    about: str
    """The first sentence of its description."""


def field_lines(model: type[BaseModel], prefix: str = "") -> list[FieldLine]:
    """The fields of a recipe, depth first; a section comes before its fields.

    Args:
        model: the recipe.
        prefix: dotted path of a section or a field, or the beginning of its name; empty: all.
    """
    lines = list(_lines(model, ""))
    within = [line for line in lines if line.name == prefix or line.name.startswith(f"{prefix}.")]
    return within if prefix and within else [line for line in lines if line.name.startswith(prefix)]


def _lines(model: type[BaseModel], path: str) -> Iterator[FieldLine]:
    seen = set()
    for name, field in model.model_fields.items():
        sections = list(_sections(field.annotation))
        yield FieldLine(path + name, _type_of(field), _default(field), _first_sentence(field.description or ""))
        for section in sections:
            for line in _lines(section, f"{path}{name}."):
                if line.name not in seen:  # branches of a union share fields
                    seen.add(line.name)
                    yield line


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that a field holds by name; those in lists and mappings have no path of their own."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, types.UnionType) or hasattr(annotation, "__metadata__"):
        for part in get_args(annotation):
            yield from _sections(part)


def _type_of(field: FieldInfo) -> str:
    return _named(field.annotation) + _range(field.metadata)


def _named(annotation: Any) -> str:
    """A type in words: `integer ≥ 1 or null`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    if hasattr(annotation, "__metadata__"):
        inner, *metadata = get_args(annotation)
        return _named(inner) + _range(metadata)
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(str(part).lower() if isinstance(part, bool) else str(part) for part in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_named(part) for part in parts))
    if origin is tuple:
        return f"list of {_named(parts[0])}" if parts[-1] is Ellipsis else f"{len(parts)} × {_named(parts[0])}"
    if origin is dict:
        return f"mapping to {_named(parts[1])}"
    return _WORDS.get(annotation, "any")


def _range(metadata: Any) -> str:
    """The bounds of a number, which may lie within a `Field` of its own."""
    found = ""
    for entry in metadata:
        bounds = [(sign, getattr(entry, name)) for name, sign in _BOUNDS if hasattr(entry, name)]
        found += "".join(f" {sign} {_number(bound)}" for sign, bound in bounds if bound < _TECHNICAL)
        if isinstance(entry, FieldInfo):
            found += _range(entry.metadata)
    return found


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default_factory is not None or field.default is PydanticUndefined:
        return "computed"
    value = field.default
    if isinstance(value, BaseModel):
        return ""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return _number(value) if isinstance(value, int | float) else str(value) or '""'


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _first_sentence(text: str) -> str:
    """Up to the first full stop; those of `Ho et al. 2020, eq. 4` are none."""
    return re.split(r"(?<!al)(?<!eq)\.\s+", " ".join(text.split()), maxsplit=1)[0].rstrip(".")
