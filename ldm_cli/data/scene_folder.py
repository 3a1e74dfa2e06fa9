"""The folder of synthetic scenes: a record of how they were made, and whether all shards are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ldm_cli.errors import LdmError, OutputError
from ldm_cli.inputs import read_input
from ldm_cli.storage import TEMPORARY_PREFIX, write_whole


def write_record(out: Path, record: dict[str, Any]) -> None:
    """Write `scenes.json`."""
    write_whole(out / "scenes.json", json.dumps(record, indent=2) + "\n")


def prepare(out: Path, record: dict[str, Any], overwrite: bool) -> bool:
    """Prepare the folder; False if it holds exactly these scenes already."""
    try:
        found = json.loads(read_input(out / "scenes.json"))
    except (LdmError, ValueError, RecursionError):
        found = {}
    present = sorted(path for pattern in ("train-*.tar", "val-*.tar") for path in out.glob(pattern))
    if found == {**record, "complete": True} and [path.name for path in present] == sorted(record["shards"]):
        return False
    ours = isinstance(found, dict) and {**found, "complete": False} == {**record, "complete": False}
    if present and not ours and not overwrite:
        raise OutputError(
            f"cannot write scenes into '{out}'",
            f"it holds other shards, '{present[0].name}' among them",
            "choose another folder, or pass --overwrite",
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in (*present, *out.glob(f"{TEMPORARY_PREFIX}*")):
            path.unlink()
    except OSError as error:
        raise OutputError(f"cannot write scenes into '{out}'", error.strerror or str(error)) from error
    write_record(out, {**record, "complete": False})
    return True
