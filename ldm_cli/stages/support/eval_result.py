"""The result of `ldm eval` as a file, and beside it, until it is there, what an interrupted evaluation has measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm_cli.errors import LdmError, OutputError
from ldm_cli.formats.json_file import write_json, write_sealed
from ldm_cli.inputs import read_input
from ldm_cli.reporting import Reporter
from ldm_cli.storage import is_sealed, storage_errors
from ldm_cli.training.run_identity import fingerprint_changes, flatten, recipe_changes
from ldm_cli.training.run_lock import RunLock

RESULT_NAME = "eval.json"
_PROVENANCE = "provenance.json"


class EvalResult:
    """The place of a result.

    Args:
        out: a folder, for `eval.json` in it, or a file whose name ends in `.json`.
        provenance: that of the evaluation.
        reporter: gets a line about every result that is found.

    Attributes:
        measured: folder of measurements.
        pictures: folder of the pictures that are kept.
        curve: of a sweep, without the suffix.
    """

    def __init__(self, out: Path, provenance: Mapping[str, Any], reporter: Reporter) -> None:
        self._file = out if out.suffix == ".json" else out / RESULT_NAME
        self.measured = self._file.with_name(f"{self._file.stem}-measured")
        self.pictures = self._file.with_name(f"{self._file.stem}-pictures")
        self.curve = self._file.with_name(f"{self._file.stem}-curve")
        self._provenance, self._reporter = provenance, reporter
        self._lock = RunLock(self.measured / ".lock")

    def claim(self, overwrite: bool) -> dict[str, Any] | None:
        """The result, if this evaluation is finished; else its place is taken, and `None`.

        Args:
            overwrite: delete a result that is there, and measurements of another evaluation.

        Raises:
            OutputError: another evaluation's result or measurements are there, another process measures, or it cannot
                be written.
            StorageError: writing failed.
        """
        if self._file.exists() and not overwrite:
            result = _content(self._file)
            self._expect_same(result.get("provenance"), self._file)
            if is_sealed(result):
                self._reporter.info(f"the result is in {self._file} already")
                return {name: value for name, value in result.items() if name != "sha256"}
            self._reporter.warn(f"'{self._file}' is damaged: it is measured again")
        file = self.measured / _PROVENANCE
        with storage_errors(self.measured):
            self.measured.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(self._reporter.warn)
            if overwrite and (self._file.exists() or self._changes(_content(file))):
                self._file.unlink(missing_ok=True)
                self._clear()
        if file.exists():
            self._expect_same(_content(file), self.measured)
            self._reporter.info(f"going on with the measurements in {self.measured}")
        write_json(file, self._provenance)
        return None

    def write(self, result: Mapping[str, Any]) -> None:
        """Write the result and delete the measurements.

        Raises:
            OutputError, StorageError: writing failed.
        """
        write_sealed(self._file, result)
        with storage_errors(self.measured):
            shutil.rmtree(self.measured)
        self._reporter.info(f"results are in {self._file}")

    def release(self) -> None:
        """Let other processes have the place."""
        self._lock.release()

    def _clear(self) -> None:
        """Delete measurements and pictures."""
        for path in [self.pictures, *self.measured.iterdir()]:
            if path.is_dir():
                shutil.rmtree(path)
            elif path.exists() and path != self._lock.file:
                path.unlink()

    def _expect_same(self, before: Any, place: Path) -> None:
        """Make sure that what is there has the provenance of this evaluation.

        Raises:
            OutputError: naming what differs.
        """
        if changes := self._changes(before):
            remedy = "choose another --out, or pass --overwrite"
            raise OutputError(f"'{place}' exists already, of another evaluation", "; ".join(changes), remedy)

    def _changes(self, before: Any) -> list[str]:
        """In what this evaluation differs from that of another provenance."""
        if not isinstance(before, dict) or not isinstance(before.get("recipe"), dict):
            return ["it has no provenance"]
        changes = recipe_changes(before["recipe"], self._provenance["recipe"])[1]
        return changes + fingerprint_changes(_fingerprints(before), _fingerprints(self._provenance))


def _fingerprints(provenance: Mapping[str, Any]) -> dict[str, str]:
    """Hashes of models and data, and the kind of device, by name."""
    hashes = {name: value for name, value in flatten(provenance.get("models", {})).items() if "sha256" in name}
    data, device = provenance.get("data", {}), str(provenance.get("device", ""))
    return {**hashes, "data": str(data.get("fingerprint")), "device": device.partition(":")[0]}


def _content(file: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where it holds none."""
    try:
        content = json.loads(read_input(file))
    except (LdmError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
