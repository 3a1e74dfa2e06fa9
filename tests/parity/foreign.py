"""What becomes of every field of another library's class."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Content = Mapping[str, Any]


@dataclass(frozen=True)
class Foreign:
    """One class of another library.

    Attributes:
        name: as the library calls it.
        file: where its fields are found.
        names: of all fields of the installed version.
        base: a small configuration, of which one field at a time is varied.
        both: what our program and the library compute with a configuration; an `Exception` of ours refuses it.
        honoured: field → other values. A dict holds the value under "", and further fields that it needs.
        refused: field → a value.
        harmless: field → a value.
    """

    name: str
    file: str
    names: set[str]
    base: Content
    both: Callable[[Content], tuple[Any, Any]]
    honoured: dict[str, list[Any]]
    refused: dict[str, Any]
    harmless: dict[str, Any]

    def varied(self, name: str, value: Any) -> dict[str, Any]:
        """The base with another value of one field, and what that needs."""
        needed = dict(value) if isinstance(value, dict) and "" in value else {"": value}
        return {**self.base, name: needed.pop(""), **needed}


def parameters_of(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters) - {"self", "args", "kwargs"}
