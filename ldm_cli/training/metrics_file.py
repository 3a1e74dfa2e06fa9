"""metrics.jsonl: one line of figures per logged step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm_cli.inputs import read_input
from ldm_cli.storage import append_text, whole_file

_MOST_BYTES = 2**34


class MetricsFile:
    """JSON objects, a line each, with the field `step`.

    Args:
        path: where; the file need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, figures: Mapping[str, Any]) -> None:
        """Add a line."""
        append_text(self.path, json.dumps(figures, allow_nan=False) + "\n")

    def num_bytes(self) -> int:
        """The size of the file."""
        return self.path.stat().st_size if self.path.exists() else 0

    def copy(self, target: Path, num_bytes: int) -> None:
        """Write the first `num_bytes` bytes to another file, for `restore`."""
        target.write_bytes(read_input(self.path, _MOST_BYTES)[:num_bytes] if num_bytes else b"")

    def last(self) -> dict[str, Any]:
        """The figures of the last line, without its step."""
        lines = read_input(self.path, _MOST_BYTES).decode().splitlines() if self.path.exists() else []
        figures: dict[str, Any] = json.loads(lines[-1]) if lines else {}
        figures.pop("step", None)
        return figures

    def agrees_with(self, copy: Path) -> bool:
        """Whether all that was copied is still there; true if the copy is missing."""
        if not copy.is_file():
            return True
        content = read_input(self.path, _MOST_BYTES) if self.path.is_file() else b""
        return content.startswith(read_input(copy, _MOST_BYTES))

    def restore(self, copy: Path | None) -> None:
        """Make the file what it was when `copy` was written; None: empty. Later lines are written again."""
        if copy is not None or self.path.exists():
            with whole_file(self.path) as temporary:
                temporary.write_bytes(b"" if copy is None else read_input(copy, _MOST_BYTES))
