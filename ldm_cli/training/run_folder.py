"""The folder of one training run: its owner, its recipe, its progress."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from ldm_cli import __version__
from ldm_cli.errors import (
    CheckpointError,
    LdmError,
    OutputError,
    Preempted,
    StorageError,
    StuckError,
    as_ldm_error,
    printable,
)
from ldm_cli.formats.hub import hub_source
from ldm_cli.formats.json_file import read_sealed, write_json, write_sealed
from ldm_cli.reporting import Reporter
from ldm_cli.storage import append_text, storage_errors, write_whole
from ldm_cli.training.checkpoint import checkpoints, commit_folder, problem_with, step_of, sweep
from ldm_cli.training.failures import FailureJournal
from ldm_cli.training.interruption import TIME_LIMIT
from ldm_cli.training.metrics_file import MetricsFile
from ldm_cli.training.run_identity import fingerprint_changes, flatten, recipe_changes
from ldm_cli.training.run_lock import RunLock


class RunFolder:
    """`runs/NAME`, locked while the context is open.

    Holds recipe.yaml (as written by the user), recipe.resolved.yaml (JSON, hence YAML: every field),
    env.json, status.json, failures.jsonl, log.txt, metrics.jsonl, checkpoints/, samples/, frozen/ (parts of the
    model that are not trained, to which checkpoints link) and, at the end, model/.

    Args:
        path: where; it need not exist yet.
        reporter: receives the messages that go to log.txt.
    """

    def __init__(self, path: Path, reporter: Reporter) -> None:
        self.path, self._reporter = path, reporter
        self.checkpoints, self.samples = path / "checkpoints", path / "samples"
        self.frozen, self.model = path / "frozen", path / "model"
        self._identity = path / "recipe.resolved.yaml"
        self.metrics = MetricsFile(path / "metrics.jsonl")
        self._lock = RunLock(path / ".lock")
        self._failures = FailureJournal(path / "failures.jsonl")
        self._progress: dict[str, int] = {}
        self._has_begun = False  # a command that is refused leaves the run's status alone
        self._step_under_way: int | None = None
        self._has_stepped = False

    def __enter__(self) -> Self:
        """Create and lock the folder, and delete the unfinished files of a killed owner.

        Raises:
            OutputError: the folder cannot be made or is owned by a live run.
            StuckError: the run ended in the same step too often.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            died_in = self._lock.acquire(self._reporter.warn)
        except OSError as error:
            remedy = "choose another place with --out"
            raise OutputError(f"cannot use '{self.path}' for the run", str(error.strerror), remedy) from error
        try:
            if died_in is not None:
                self._failures.add(died_in, "killed")
            self._failures.check()
            with storage_errors(self.checkpoints):
                self.checkpoints.mkdir(exist_ok=True)
            for folder in (self.path, self.checkpoints, self.samples):
                sweep(folder)
        except LdmError as error:
            self._note_end(error)
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._note_end(error)
        self._lock.release()

    def _note_end(self, error: BaseException) -> None:
        """Write to log.txt, status.json and failures.jsonl why this process ended."""
        known = as_ldm_error(error)
        message = str(known) if known is not None else printable(f"{type(error).__name__}: {error}")
        code = known.code if known is not None else 130 if isinstance(error, KeyboardInterrupt) else LdmError.code
        self.note(f"stopped: {message}")
        if not self._has_begun and not isinstance(error, StuckError):
            return
        with suppress(LdmError):  # a full disk has been reported by the error itself
            if isinstance(error, Preempted):
                self.status("preempted", code=code, reason=error.cause)
            else:
                self.status("failed", code=code, error=message)
            may_pass = isinstance(known, Preempted | StorageError | OutputError | StuckError) or code == 130
            if self._step_under_way is not None and not may_pass:
                self._failures.add(self._step_under_way, message)
            elif isinstance(error, Preempted) and error.cause == TIME_LIMIT and not self._has_stepped:
                self._failures.add(self._progress.get("step", 0) + 1, message)
        self.begin_step(None)

    def begin_step(self, step: int | None) -> None:
        """Note which step is being computed, so that the next process knows where this one ended; None: no step."""
        self._step_under_way = step
        self._has_stepped |= step is not None
        self._lock.note(step)

    def log(self, message: str) -> None:
        """Inform the user, and write the message to log.txt."""
        self._reporter.info(message)
        self.note(message)

    def warn(self, message: str) -> None:
        """Warn the user, and write the message to log.txt."""
        self._reporter.warn(message)
        self.note(f"warning: {message}")

    def note(self, message: str) -> None:
        """Write a line to log.txt, if this process owns the folder."""
        if not self._lock.is_held:  # one process writes, not each rank
            return
        # A full disk is reported where it loses something.
        with suppress(LdmError):
            append_text(self.path / "log.txt", printable(message) + "\n")

    def expect_unused(self) -> None:
        """Make sure that there is nothing to continue.

        Raises:
            CheckpointError: the folder holds checkpoints.
        """
        if checkpoints(self.checkpoints):
            raise CheckpointError(
                f"'{self.checkpoints}' holds checkpoints",
                "--resume never would mix two runs",
                f"delete '{self.path}' or choose another --out",
            )

    def changes(self, resolved: Mapping[str, Any], fingerprints: Mapping[str, str]) -> list[str]:
        """The fields in which the recipe differs from that of the folder's run, none of which changes a weight.

        Args:
            resolved: the whole recipe as plain data.
            fingerprints: hash of the training data's index, and of the weights of each model that the run uses.

        Raises:
            CheckpointError: the folder belongs to a run with another recipe, other data or other models.
        """
        before = self.recorded()
        if not before:
            return []
        harmless, causes = recipe_changes(before.get("recipe", {}), resolved)
        causes += fingerprint_changes(before.get("fingerprints", {}), fingerprints)
        if causes:
            raise CheckpointError(
                f"'{self.path}' belongs to another run",
                "changed " + "; ".join(causes[:5]),
                "undo the change, or choose another name or --out",
            )
        return harmless

    def recorded(self) -> dict[str, Any]:
        """`recipe` and `fingerprints` of the folder's run; nothing if it has neither checkpoint nor finished model.

        If the file is damaged, its copy in a checkpoint counts.

        Raises:
            CheckpointError: all copies are damaged.
        """
        saved = checkpoints(self.checkpoints)
        if not saved and not self.model.is_dir():
            return {}
        places = [self._identity, *(folder / self._identity.name for folder in reversed(saved))]
        found = next((content for place in places if (content := read_sealed(place)) is not None), {})
        if saved and not found:
            cause, remedy = "it is damaged, in its checkpoints too", "choose another --out, or delete the folder"
            raise CheckpointError(f"'{self._identity}' does not say which run this is", cause, remedy)
        return found

    def claim(
        self, resolved: Mapping[str, Any], source: str, fingerprints: Mapping[str, str], device: torch.device
    ) -> None:
        """Record recipe and fingerprints, or check them against the folder's; arguments and errors as in `changes`.

        Args:
            source: the recipe's text as the user wrote it.
        """
        for change in self.changes(resolved, fingerprints):
            self.log(f"the recipe changed: {change}")
        if not self.recorded():  # what an attempt without a checkpoint left may belong to another recipe
            for folder in (self.frozen, self.samples):
                shutil.rmtree(folder, ignore_errors=True)
        if self._identity.exists() and read_sealed(self._identity) is None:
            self.warn(f"'{self._identity}' was damaged: it is written again")
        self._has_begun = True
        write_whole(self.path / "recipe.yaml", source)
        write_sealed(self._identity, {"recipe": resolved, "fingerprints": fingerprints})
        paths = {name: Path(value) for name, value in flatten(resolved).items() if isinstance(value, str)}
        models = {name: str(model) for name, path in paths.items() if (model := hub_source(path))}
        write_json(self.path / "env.json", environment(device) | {"models": models})

    def status(self, state: str, *, step: int | None = None, steps: int | None = None, **details: Any) -> None:
        """Write status.json.

        Args:
            state: `running`, `preempted`, `failed` or `finished`.
            step: the last completed one; None: as before.
            steps: of the whole run; None: as before.
            details: further entries; `code` is the exit code of a run that is over.
        """
        if step is not None and steps is not None:
            self._progress = {"step": step, "steps": steps}
        elif not self._progress and (saved := checkpoints(self.checkpoints)):
            self._progress = {"step": step_of(saved[-1])}
        self._has_begun = True
        owner = {"pid": os.getpid(), "host": socket.gethostname()}
        content = {"state": state, **self._progress, **owner, "code": None, **details}
        write_sealed(self.path / "status.json", content)

    def copy_records(self, checkpoint: Path, num_metrics_bytes: int) -> None:
        """Copy into a checkpoint which run it belongs to, and the first bytes of metrics.jsonl."""
        self.metrics.copy(checkpoint / self.metrics.path.name, num_metrics_bytes)
        if self._identity.exists():
            shutil.copyfile(self._identity, checkpoint / self._identity.name)

    def restore_metrics(self, checkpoint: Path | None) -> None:
        """Make metrics.jsonl what it was at a checkpoint of this run; None: at step 0."""
        copy = None if checkpoint is None else checkpoint / self.metrics.path.name
        if copy is not None and not self.metrics.agrees_with(copy):
            self.warn(f"'{self.metrics.path}' was damaged: its lines are taken from the checkpoint")
        self.metrics.restore(copy)

    def share(self, write: Callable[[Path], None]) -> None:
        """Fill `frozen` through `commit_folder`, unless it exists and verifies; only the owner of the folder writes."""
        if self._lock.is_held and problem_with(self.frozen) is not None:
            commit_folder(self.frozen, write, replace=True)

    def finished(self) -> dict[str, Any] | None:
        """status.json's content if the run is finished; None if it is not, or if damage is to be mended.

        Raises:
            CheckpointError: it is damaged, and there is no checkpoint to mend it from.
        """
        file = self.path / "status.json"
        status = read_sealed(file) if file.exists() else {}
        damage = None
        if status is None:
            damage = f"'{file}' is damaged"
        elif status.get("state") != "finished":
            return None
        elif (problem := problem_with(self.model)) is not None:
            damage = f"'{self.model}' is damaged: {problem}"
        saved = checkpoints(self.checkpoints)
        if damage is None:
            is_whole = not saved or self.metrics.agrees_with(saved[-1] / self.metrics.path.name)
            return status if is_whole else None  # `restore_metrics` says so
        if not saved and self.model.is_dir():
            raise CheckpointError(
                damage, "there is no checkpoint to go on from", f"delete '{self.path}' to start again"
            )
        self._reporter.warn(f"{damage}; the run goes on from its newest checkpoint")
        return None


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, machine and thread count, on which bitwise repetition depends; no environment variables.

    Args:
        device: where the process computes; no other is asked for its name.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    return {
        "ldm": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": name,
        "num_threads": torch.get_num_threads(),
        "executable": Path(sys.executable).name,
    }
