"""Checkpoints that are complete or absent.

Commit: write into `.tmp-…` beside the target → fsync every file → manifest.json last (sizes, sha256, versions) →
fsync → rename → fsync the parent; only then are old checkpoints deleted. The latest checkpoint is the one of
the highest step whose manifest verifies: no symlink, no time stamp.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from ldm_cli import __version__
from ldm_cli.errors import CheckpointError, LdmError
from ldm_cli.manifest import MANIFEST, Entry, known_sha256, read_manifest
from ldm_cli.storage import TEMPORARY_PREFIX, file_sha256, fsync_path, storage_errors, write_whole

_STEP_PREFIX = "step-"


def checkpoint_name(step: int) -> str:
    """Folder name of a checkpoint, which sorts by step: `step-00000500`."""
    return f"{_STEP_PREFIX}{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Inverse of `checkpoint_name`."""
    return int(checkpoint.name.removeprefix(_STEP_PREFIX))


def temporary_folder(target: Path) -> Path:
    """The folder that `commit_folder` fills before it is called `target`."""
    return target.parent / f"{TEMPORARY_PREFIX}{target.name}"


def commit_folder(
    target: Path,
    write: Callable[[Path], None],
    *,
    replace: bool = False,
    linked: Path | None = None,
    num_bytes: int | None = None,
) -> None:
    """Create the folder `target` in one step: `write` fills a temporary folder, which is synced, sealed and renamed.

    If `write` leaves it empty, `target` is not created.

    Args:
        target: final path; its parent must exist.
        write: fills the folder that it is given.
        replace: an existing `target` is moved aside and deleted after the commit.
        linked: a committed folder whose files `write` may link to; they are not read again.
        num_bytes: how much is written, for the error on a full disk.

    Raises:
        OutputError, StorageError: writing failed; nothing is left under the final name, nothing temporary stays.
    """
    temporary = temporary_folder(target)
    old = target.parent / f"{TEMPORARY_PREFIX}old-{target.name}"
    for stale in (temporary, old):
        shutil.rmtree(stale, ignore_errors=True)
    with storage_errors(target, num_bytes):
        try:
            temporary.mkdir()
            write(temporary)
            if not any(temporary.iterdir()):
                temporary.rmdir()
                return
            _seal(temporary, {} if linked is None else _known(linked))
            if replace and target.exists():
                target.rename(old)
            temporary.rename(target)
            fsync_path(target.parent)
        except BaseException:
            if old.exists() and not target.exists():
                with suppress(OSError):
                    old.rename(target)
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    shutil.rmtree(old, ignore_errors=True)


def _seal(folder: Path, known: dict[tuple[int, int], Entry]) -> None:
    """Sync every file and folder below `folder` and write its manifest last.

    Args:
        known: (device, inode) → entry, of files that were sealed before and are linked to.
    """
    entries: dict[str, Entry] = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        facts = file.stat()
        inode = (facts.st_dev, facts.st_ino)
        if inode not in known:
            fsync_path(file)
            known[inode] = {"bytes": facts.st_size, "sha256": file_sha256(file)}
        entries[file.relative_to(folder).as_posix()] = known[inode]
    versions = {"ldm": __version__, "torch": torch.__version__, "python": platform.python_version()}
    write_whole(folder / MANIFEST, json.dumps({"versions": versions, "files": entries}, indent=1) + "\n")
    for directory in sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True):
        fsync_path(directory)
    fsync_path(folder)


def _known(folder: Path) -> dict[tuple[int, int], Entry]:
    """The entries of a committed folder's manifest by device and inode; nothing if there is no such folder."""
    with suppress(OSError, LdmError, ValueError, KeyError, TypeError, AttributeError):
        stats = {name: ((folder / name).stat(), entry) for name, entry in read_manifest(folder).items()}
        return {(facts.st_dev, facts.st_ino): entry for facts, entry in stats.values()}
    return {}


def link_folder(source: Path, target: Path) -> None:
    """Put the files of a committed folder into `target`, as links where the file system has them, else as copies.

    Raises:
        OSError: copying failed.
    """
    for name in read_manifest(source):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        _link(source / name, target / name)


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:  # no links here, or too many of this file
        shutil.copyfile(source, target)


def problem_with(folder: Path) -> str | None:
    """None if every file in the manifest has its recorded size and sha256, else the first problem."""
    try:
        for name, entry in read_manifest(folder).items():
            if (problem := _problem(folder / name, entry)) is not None:
                return f"'{name}' {problem}"
    except (OSError, LdmError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"'{MANIFEST}' cannot be read ({error})"
    return None


def _problem(file: Path, entry: Entry) -> str | None:
    if not file.is_file():
        return "is missing"
    if file.stat().st_size != entry["bytes"]:
        return f"has {file.stat().st_size} bytes, not {entry['bytes']}"
    return None if known_sha256(file, again=True) == entry["sha256"] else "does not have the content of its sha256"


def _mend(folder: Path, spare: Path) -> list[str]:
    """Put sound files of the committed folder `spare` in place of damaged ones with the same sha256; their names."""
    mended = []
    with suppress(OSError, LdmError, ValueError, KeyError, TypeError, AttributeError):
        sound = {entry["sha256"]: spare / name for name, entry in read_manifest(spare).items()}
        for name, entry in read_manifest(folder).items():
            file, source = folder / name, sound.get(entry["sha256"])
            if source is not None and _problem(file, entry) is not None and _problem(source, entry) is None:
                temporary = file.with_name(f"{TEMPORARY_PREFIX}{file.name}")
                temporary.unlink(missing_ok=True)
                _link(source, temporary)
                temporary.replace(file)
                mended.append(name)
    return mended


def checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints under `folder`, oldest first."""
    found = [p for p in folder.glob(f"{_STEP_PREFIX}*") if p.is_dir() and p.name.removeprefix(_STEP_PREFIX).isdecimal()]
    return sorted(found, key=step_of)


def latest_checkpoint(folder: Path, warn: Callable[[str], None], spare: Path | None = None) -> Path | None:
    """The newest checkpoint that verifies; damaged ones are passed over with a warning.

    Args:
        warn: receives a message for each damaged checkpoint.
        spare: a committed folder that checkpoints link to; its files replace damaged ones in a checkpoint. None:
            nothing is written.

    Raises:
        CheckpointError: there are checkpoints, but none verifies.
    """
    candidates = checkpoints(folder)
    for candidate in reversed(candidates):
        problem = problem_with(candidate)
        if problem is not None and spare is not None and (mended := _mend(candidate, spare)):
            warn(f"checkpoint '{candidate.name}' was damaged: {problem}; mended {len(mended)} files")
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
    """Delete all but the newest `keep` checkpoints; one that cannot be deleted is tried again next time."""
    for old in checkpoints(folder)[:-keep]:
        # Renamed first: a kill in the middle of the deletion leaves no half checkpoint under a final name.
        doomed = folder / f"{TEMPORARY_PREFIX}{old.name}"
        with suppress(OSError):
            old.rename(doomed)
            shutil.rmtree(doomed)


def sweep(folder: Path) -> None:
    """Delete the temporary files of an interrupted save or deletion."""
    for stale in folder.glob(f"{TEMPORARY_PREFIX}*"):
        with suppress(OSError):
            if stale.is_dir() and not stale.is_symlink():
                shutil.rmtree(stale)
            else:
                stale.unlink()
