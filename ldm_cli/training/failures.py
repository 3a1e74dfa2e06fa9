"""The steps in which processes of a run failed, and when to give up: a queue would repeat a failing job for ever."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

from ldm_cli.errors import StuckError, printable
from ldm_cli.inputs import read_input
from ldm_cli.storage import append_text

MAX_ATTEMPTS = 5
"""Processes of a run that may end in the same step, one after the other."""


class FailureJournal:
    """failures.jsonl: a line for each process that died in a step, or whose time limit came before its first step.

    Other ends (killed while saving or starting, stopped by a signal, disk full) are not the step's fault.

    Args:
        unit: what a step is called.
    """

    def __init__(self, file: Path, unit: str = "step") -> None:
        self.file, self._unit = file, unit

    def add(self, step: int, cause: str) -> None:
        """Note that a process ended in `step`.

        Raises:
            StorageError: writing failed.
        """
        entry = {"step": step, "cause": printable(cause), "host": socket.gethostname(), "noted_by_pid": os.getpid()}
        append_text(self.file, json.dumps(entry, ensure_ascii=False) + "\n")

    def check(self) -> None:
        """Make sure that the last processes did not all end in the same step.

        Raises:
            StuckError: they did.
        """
        last = self._entries()[-MAX_ATTEMPTS:]
        if len(last) == MAX_ATTEMPTS and len({entry["step"] for entry in last}) == 1:
            raise StuckError(
                f"'{self.file.parent}' ended {MAX_ATTEMPTS} times in {self._unit} {last[0]['step']}",
                f"the last time: {last[-1]['cause']}",
                f"do not requeue; remove the cause, then delete '{self.file}' and run the same command again",
            )

    def _entries(self) -> list[dict[str, Any]]:
        content = read_input(self.file) if os.path.lexists(self.file) else b""
        lines = content.decode("utf-8", "replace").splitlines()
        entries = []
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # cut short by a kill
            if isinstance(entry, dict) and isinstance(entry.get("step"), int) and "cause" in entry:
                entries.append(entry)
        return entries
