"""metrics.jsonl: one line of figures per logged step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm_cli.storage import fsync_path, storage_errors, write_whole


class MetricsFile:
    """JSON objects, a line each, with the field `step`.

    Args:
        path: where; the file need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, figures: Mapping[str, Any]) -> None:
        """Add a line."""
        with storage_errors(self.path), self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(figures) + "\n")

    def sync(self) -> None:
        """Bring the file to the disk, so that a checkpoint does not outlast the lines before it."""
        if self.path.exists():
            with storage_errors(self.path):
                fsync_path(self.path)

    def last(self) -> dict[str, Any]:
        """The figures of the last line, without its step."""
        lines = self._lines()
        figures: dict[str, Any] = json.loads(lines[-1]) if lines else {}
        figures.pop("step", None)
        return figures

    def rewind(self, step: int) -> None:
        """Drop the lines that a run which continues after `step` writes again; at step 0 these are all lines."""
        if self.path.exists():
            kept = []
            for line in self._lines():
                try:
                    if step > 0 and json.loads(line)["step"] <= step:
                        kept.append(line)
                except (ValueError, KeyError, TypeError):
                    continue  # a killed process may have cut the last line short
            write_whole(self.path, "".join(f"{line}\n" for line in kept))

    def _lines(self) -> list[str]:
        return self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
