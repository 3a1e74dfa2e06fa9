"""Manifests: `manifest.json` lists every file below its folder with size and sha256, by which each reader checks it.

Runs write one into every checkpoint and model (`training/checkpoint.py`). Folders of other programs have none.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TypedDict

from ldm_cli.errors import CheckpointError, LdmError
from ldm_cli.inputs import MOST_BYTES, input_errors, read_input
from ldm_cli.storage import file_sha256, user_cache, write_whole

MANIFEST = "manifest.json"

_LEVELS = 3  # STEP/model/unet/config.json
_DAMAGED = "download or save it again"
# A smaller file is hashed sooner than its digest is looked up.
_REMEMBERED_BYTES = 2**20
_MOST_NOTES = 4096
# Files may change twice within one tick of the clock that stamps them.
_SECONDS_OF_REST = 1


class Entry(TypedDict):
    """A file's entry in a manifest."""

    bytes: int
    sha256: str


def read_listed(path: Path, most_bytes: int = MOST_BYTES, *, remedy: str = "") -> bytes:
    """The content of a file of a model, checked against the manifest of its folder, if that has one.

    Raises:
        CheckpointError: it is too large, or not the file that the manifest names.
        InputNotFoundError, StorageError: as in `open_input`.
    """
    content = read_input(path, most_bytes, too_large=CheckpointError, remedy=remedy)
    for entry in _entries_of(path):
        if len(content) != entry["bytes"] or hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise _changed(path)
    return content


def expect_listed(path: Path) -> None:
    """Check a file of any size as `read_listed` does. Its hash is computed once for each state of the file.

    Raises:
        CheckpointError, InputNotFoundError, StorageError: as in `read_listed`.
    """
    for entry in _entries_of(path):
        with input_errors(path):
            if path.stat().st_size != entry["bytes"] or known_sha256(path) != entry["sha256"]:
                raise _changed(path)


def _changed(path: Path) -> CheckpointError:
    cause = f"its content is not that of {MANIFEST}"
    return CheckpointError(f"'{path}' is damaged", cause, f"{_DAMAGED}; delete {MANIFEST} if you changed the folder")


def _entries_of(path: Path) -> list[Entry]:
    """The entries of a file in the manifest above it, by its name and, through links, by its real name.

    Raises:
        CheckpointError: a manifest is damaged, does not name the file, or names another of its folder that is missing.
    """
    found = []
    for folder in {os.path.abspath(path.parent), os.path.realpath(path.parent)}:  # noqa: PTH100
        for level in (Path(folder), *Path(folder).parents)[:_LEVELS]:
            entries = _listed_files(level)
            if entries is None:
                continue
            name = (Path(folder) / path.name).relative_to(level).as_posix()
            if name not in entries:
                cause = f"{MANIFEST} does not name '{name}'"
                raise CheckpointError(f"'{level}' is damaged", cause, f"{_DAMAGED}, or delete what was added")
            beside = (level / other for other in entries if (level / other).parent == Path(folder))
            if lost := next((file for file in beside if not file.is_file()), None):
                raise CheckpointError(f"'{level}' is damaged", f"'{lost}' is missing", _DAMAGED)
            found.append(entries[name])
            break
    return found


def _listed_files(folder: Path) -> dict[str, Entry] | None:
    """The files that the manifest of a folder names; None where it has none, or one of another program."""
    file = folder / MANIFEST
    try:
        facts = file.stat()
    except OSError:
        return None
    try:
        return _read_manifest(file, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_size, facts.st_ino)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"cannot read '{file}'", f"it is damaged: {error}", _DAMAGED) from error


@lru_cache(maxsize=64)
def _read_manifest(file: Path, *state: int) -> dict[str, Entry] | None:
    """The manifest as it is in this state."""
    content = json.loads(read_input(file))
    if isinstance(content, dict) and not {"files", "versions"} & content.keys():
        return None
    return _checked_entries(content)


def read_manifest(folder: Path) -> dict[str, Entry]:
    """The files that the manifest of a listed folder names.

    Raises:
        LdmError: as in `read_input`.
        ValueError, KeyError, TypeError, RecursionError: it is damaged.
    """
    return _checked_entries(json.loads(read_input(folder / MANIFEST)))


def _checked_entries(content: dict[str, dict[str, Entry]]) -> dict[str, Entry]:
    files = content["files"]
    if not isinstance(files, dict) or not files:
        raise ValueError("it lists no files")
    for name, entry in files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError("it names files outside of the folder")
        if type(entry["bytes"]) is not int or not isinstance(entry["sha256"], str):
            raise TypeError(f"the entry of '{name}' is not size and sha256")
    return files


def known_sha256(path: Path, *, again: bool = False) -> str:
    """`file_sha256`, remembered as by `remembered_digest`."""
    return remembered_digest([path], "file", lambda: file_sha256(path), again=again)


def remembered_digest(files: Sequence[Path], kind: str, compute: Callable[[], str], *, again: bool = False) -> str:
    """What `compute` makes of the content of some files, kept in the user's cache for as long as none has changed.

    A state is path, size, times of change, device and inode. The cache may be deleted at any time.

    Args:
        files: are read by `compute`.
        kind: of digest.
        compute: the hex digest.
        again: compute it though it is known.

    Raises:
        OSError: a file cannot be read.
    """
    states = [(str(file.resolve()), file.stat()) for file in files]
    if sum(facts.st_size for _, facts in states) < _REMEMBERED_BYTES:
        return compute()
    facts = [[n, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_dev, s.st_ino] for n, s in states]
    key = hashlib.sha256(json.dumps([kind, facts]).encode()).hexdigest()
    note = user_cache() / "digests" / key
    if not again and (known := _noted_digest(note)) is not None:
        return known
    digest = compute()
    if time.time() - max(s.st_ctime for _, s in states) > _SECONDS_OF_REST:
        with suppress(OSError, LdmError):
            if note.parent.is_dir() and len(list(note.parent.iterdir())) >= _MOST_NOTES:
                shutil.rmtree(note.parent)
            note.parent.mkdir(parents=True, exist_ok=True)
            write_whole(note, f"{digest} {_seal(note, digest)}\n")
    return digest


def _noted_digest(note: Path) -> str | None:
    """The digest of a note; None where there is none, or a damaged one."""
    with suppress(OSError, LdmError, UnicodeError):
        found = re.fullmatch(r"([0-9a-f]{64}) ([0-9a-f]{64})\n", read_input(note, 200).decode())
        if found and found[2] == _seal(note, found[1]):
            return found[1]
    return None


def _seal(note: Path, digest: str) -> str:
    return hashlib.sha256(f"{note.name} {digest}".encode()).hexdigest()
