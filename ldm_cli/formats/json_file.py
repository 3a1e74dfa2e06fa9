"""JSON files that are read with good errors and written whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm_cli.errors import CheckpointError, DivergedError, LdmError
from ldm_cli.manifest import read_listed
from ldm_cli.storage import is_sealed, sealed, write_whole


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; a manifest above it must name its content.

    Raises:
        CheckpointError: it holds no JSON object; or as in `read_listed`.
        InputNotFoundError, StorageError: as in `read_listed`.
    """
    data = read_listed(path, remedy="give a folder in the Hugging Face layout")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read '{path}'", f"not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"cannot read '{path}'", f"a JSON object expected, {type(content).__name__} found")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace `path` by a JSON file as a whole; errors as in `json_text` and `whole_file`."""
    write_whole(path, json_text(content) + "\n")


def json_text(content: Any) -> str:
    """JSON as its standard has it, which knows no NaN.

    Raises:
        DivergedError: a number is not finite.
    """
    try:
        return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise DivergedError("a result cannot be written", "some of its numbers are not finite") from error


def read_sealed(path: Path) -> dict[str, Any] | None:
    """The content of a file of `write_sealed`; None if it is missing or damaged."""
    try:
        content = read_json(path)
    except LdmError:
        return None
    return content if is_sealed(content) else None


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """`write_json` of the content and its hash."""
    write_json(path, sealed(content))
