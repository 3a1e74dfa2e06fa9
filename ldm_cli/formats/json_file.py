"""JSON files that are read with good errors and written whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm_cli.errors import CheckpointError, InputNotFoundError, LdmError, StorageError
from ldm_cli.storage import is_sealed, sealed, write_whole


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        InputNotFoundError: there is no such file.
        CheckpointError: it holds no JSON object.
        StorageError: it cannot be read.
    """
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputNotFoundError(f"'{path}' not found", remedy="give a folder in the Hugging Face layout") from error
    except OSError as error:
        raise StorageError(f"cannot read '{path}'", error.strerror or str(error)) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read '{path}'", f"not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"cannot read '{path}'", f"a JSON object expected, {type(content).__name__} found")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace `path` by a JSON file as a whole; errors as in `whole_file`."""
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


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
