"""Checkpoints that are either whole or not there.

Commit: write into `.tmp-…` beside the target → fsync every file → manifest.json last (sizes and sha256) →
fsync → rename → fsync the parent; only then are old checkpoints deleted. The latest checkpoint is the one of
the highest step whose manifest verifies: no symlink, no time stamp.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ldm_cli import __version__
from ldm_cli.errors import CheckpointError, StorageError

MANIFEST = "manifest.json"
_STEP_PREFIX = "step-"
_TEMPORARY_PREFIX = ".tmp-"


def checkpoint_name(step: int) -> str:
    """Folder name of a checkpoint, which sorts by step: `step-00000500`."""
    return f"{_STEP_PREFIX}{step:08d}"


def sha256_of(file: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fsync_path(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def storage_errors(target: Path) -> Iterator[None]:
    """Turn an OSError while writing `target` into a `StorageError` that names the room left.

    Raises:
        StorageError: in place of any OSError, or of what safetensors makes of one.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        free = shutil.disk_usage(target.parent).free
        cause = f"{os.strerror(number) if number else error} ({free / 2**20:.0f} MiB free)"
        raise StorageError(
            f"cannot write '{target}'", cause, "free some space and run the same command again"
        ) from error


def commit_folder(target: Path, write: Callable[[Path], None], replace: bool = False) -> None:
    """Create the folder `target` as a whole: `write` fills a temporary folder, which is synced, sealed and
    renamed.

    What `write` leaves empty is not created.

    Args:
        target: final path; its parent must exist.
        write: fills the folder that it is given.
        replace: an existing `target` is moved aside and deleted after the commit.

    Raises:
        StorageError: writing failed; nothing is left under the final name, nothing temporary stays.
    """
    temporary = target.parent / f"{_TEMPORARY_PREFIX}{target.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    with storage_errors(target):
        try:
            temporary.mkdir()
            write(temporary)
            if not any(temporary.iterdir()):
                temporary.rmdir()
                return
            _seal(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        old = target.parent / f"{_TEMPORARY_PREFIX}old-{target.name}"
        shutil.rmtree(old, ignore_errors=True)
        if replace and target.exists():
            target.rename(old)
        temporary.rename(target)
        fsync_path(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _seal(folder: Path) -> None:
    """Sync every file and folder below `folder` and write its manifest last."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    entries = {}
    for file in files:
        fsync_path(file)
        entries[file.relative_to(folder).as_posix()] = {
            "bytes": file.stat().st_size,
            "sha256": sha256_of(file),
        }
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"ldm_version": __version__, "files": entries}, indent=1) + "\n")
    fsync_path(manifest)
    for directory in sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True):
        fsync_path(directory)
    fsync_path(folder)


def problem_with(folder: Path) -> str | None:
    """None if every file listed in the manifest has its recorded size and sha256, else what is wrong."""
    try:
        files: dict[str, dict[str, Any]] = json.loads((folder / MANIFEST).read_text())["files"]
        for name, entry in files.items():
            file = folder / name
            if not file.is_file():
                return f"'{name}' is missing"
            if file.stat().st_size != entry["bytes"]:
                return f"'{name}' has {file.stat().st_size} bytes, not {entry['bytes']}"
            if sha256_of(file) != entry["sha256"]:
                return f"the content of '{name}' does not match its sha256"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"'{MANIFEST}' cannot be read ({error})"
    return None


def checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints under `folder`, oldest first."""
    found = [p for p in folder.glob(f"{_STEP_PREFIX}*") if p.is_dir() and p.name[len(_STEP_PREFIX) :].isdigit()]
    return sorted(found, key=lambda p: int(p.name[len(_STEP_PREFIX) :]))


def latest_checkpoint(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies; damaged ones are passed over with a warning.

    Raises:
        CheckpointError: there are checkpoints, but none verifies.
    """
    candidates = checkpoints(folder)
    for candidate in reversed(candidates):
        problem = problem_with(candidate)
        if problem is None:
            return candidate
        warn(f"checkpoint '{candidate.name}' is damaged: {problem}; falling back to the one before")
    if candidates:
        raise CheckpointError(
            f"no checkpoint in '{folder}' can be used",
            f"all {len(candidates)} are damaged",
            "restore one, delete them to start again, or choose another --out",
        )
    return None


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for old in checkpoints(folder)[:-keep]:
        # Renamed first: a kill in the middle of the deletion leaves no half checkpoint under a final name.
        doomed = folder / f"{_TEMPORARY_PREFIX}{old.name}"
        old.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Delete what an interrupted save or deletion left behind."""
    for stale in folder.glob(f"{_TEMPORARY_PREFIX}*"):
        if stale.is_dir():
            shutil.rmtree(stale, ignore_errors=True)
        else:
            stale.unlink(missing_ok=True)
