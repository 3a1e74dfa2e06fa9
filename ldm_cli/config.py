"""The base of every typed configuration: frozen, strict, nothing unknown accepted."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails

from ldm_cli.storage import expand_home

_LARGEST = 2**64
_TEXTS = frozenset(("prompt", "prompts", "negative", "any_of"))


@dataclass(frozen=True)
class NamesModel:
    """Marks a field that names a model: by a folder, a file, or a name on the Hugging Face hub.

    Attributes:
        components: subfolders that are read of a pipeline, of which the field means the first; empty: all, and the
            field means the pipeline.
    """

    components: tuple[str, ...] = ()


class Config(BaseModel):
    """A frozen, strict record; unknown keys and silent conversions (text to number, …) are errors.

    Docstrings under the fields are their descriptions in `ldm recipe schema`.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        protected_namespaces=(),
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    @field_validator("*")
    @classmethod
    def _expand_paths(cls, value: Any, info: ValidationInfo) -> Any:
        """Expand `~` in every field but those that hold other texts, so that all paths are treated alike.

        An empty path would be the current folder. It is refused, unless that is the field's default.
        """
        if isinstance(value, int) and abs(value) >= _LARGEST:
            raise ValueError(f"expected a number of at most 64 bits, found {float(value):.3g}")
        if info.field_name is None or info.field_name in _TEXTS:
            return value
        if "" in (value if isinstance(value, tuple) else (value,)) and cls.model_fields[info.field_name].default != "":
            raise ValueError("expected text, found ''")
        if isinstance(value, tuple):
            return tuple(expand_home(entry) if isinstance(entry, str) else entry for entry in value)
        if isinstance(value, dict):
            return {name: expand_home(entry) if isinstance(entry, str) else entry for name, entry in value.items()}
        return expand_home(value) if isinstance(value, str) else value

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Validate plain data as JSON would be: lists become tuples and 1 may stand for 1.0, but "1" is no number.

        Raises:
            pydantic.ValidationError: with one entry per problem.
        """
        return cls.model_validate_json(json.dumps(values))

    def to_mapping(self) -> dict[str, Any]:
        """The configuration as plain JSON data, every field present."""
        result: dict[str, Any] = self.model_dump(mode="json")
        return result


def causes(error: ValidationError) -> list[str]:
    """What pydantic found wrong, one text per problem, with the field's name where it is about one."""
    found = []
    for one in error.errors():
        place, message = ".".join(map(str, one["loc"])), one["msg"].removeprefix("Value error, ")
        message = message[:1].lower() + message[1:]
        if one["type"] == "literal_error" and isinstance(one["input"], str):
            message = f"found text {one['input'][:60]!r}{did_you_mean(one['input'], words_of(one))}, "
            message += f"expected {one['ctx']['expected']}"
        found.append(f"{place}: {message}" if place else message)
    return found


def words_of(error: ErrorDetails) -> list[str]:
    """The words that a field allows, if this error is that its text is none of them."""
    return re.findall(r"'([^']*)'", error["ctx"]["expected"]) if error["type"] == "literal_error" else []


def suggest(word: str, known: list[str]) -> str | None:
    """The known word that `word` was most likely meant to be, or None."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[close[0]] if close else None


def did_you_mean(word: str, known: list[str]) -> str:
    """` (did you mean 'x'?)`, or nothing."""
    suggestion = suggest(word, known)
    return f" (did you mean '{suggestion}'?)" if suggestion else ""
