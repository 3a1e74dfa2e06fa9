"""The files of a source: all of a folder, one by its name, and the bytes of one."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from ldm_cli.data.bad_samples import BadSampleError
from ldm_cli.data.config import DataConfig
from ldm_cli.data.tables import is_picture
from ldm_cli.errors import DataError, LdmError
from ldm_cli.inputs import read_input

_HIDDEN = frozenset(("thumbs.db", "desktop.ini", "__macosx", "@eadir"))
_MAX_BYTES: int = DataConfig.model_fields["max_member_bytes"].default


class SourceFiles:
    """The regular files of a folder and of all folders below it.

    Links are followed, a folder is entered once, hidden files are passed over.

    Args:
        folder: where to look, at the first request.
        pass_over: receives kind and name of each file that is passed over.
    """

    def __init__(self, folder: Path, pass_over: Callable[[str, str], None] = lambda kind, name: None) -> None:
        self._folder, self._pass_over = folder, pass_over

    def name(self, path: Path) -> str:
        """The path from the folder, with slashes."""
        return path.relative_to(self._folder).as_posix()

    @cached_property
    def paths(self) -> list[Path]:
        """All files, sorted by name."""
        found: list[Path] = []
        entered: set[str] = set()
        for parent, folders, files in os.walk(self._folder, onerror=self._pass_over_unreadable, followlinks=True):
            if (real := os.path.realpath(parent)) in entered:
                self._pass_over("folder linked twice", self.name(Path(parent)))
                folders.clear()
                continue
            entered.add(real)
            hidden = {name for name in (*folders, *files) if name.startswith(".") or name.lower() in _HIDDEN}
            for name in sorted(hidden):
                self._pass_over("hidden or system file", self.name(Path(parent, name)))
            folders[:] = sorted({*folders} - hidden)
            for path in sorted(Path(parent, name) for name in {*files} - hidden):
                if path.is_file():
                    found.append(path)
                else:
                    self._pass_over("no regular file", self.name(path))
        return sorted(found, key=self.name)

    def find(self, name: str, start: Path) -> Path:
        """The file that a table names.

        Args:
            name: a path from `start`; else the name of a single file, or the stem of a single picture, in any capitals.

        Raises:
            BadSampleError: "missing file" or "ambiguous file".
        """
        for path in (start / name, start / name.replace("\\", "/")):
            if os.path.isfile(path):  # noqa: PTH113 (Path.is_file raises for a name that is too long)
                return path
        found = self._by_name.get(path.name.lower(), [])
        if len(found) > 1:
            raise BadSampleError("ambiguous file", f"{found[0]} or {found[1]}")
        if not found:
            raise BadSampleError("missing file", "there is no such file")
        return found[0]

    @cached_property
    def _by_name(self) -> dict[str, list[Path]]:
        """The files by their names in lower case, and pictures by their names without suffix."""
        found: dict[str, list[Path]] = {}
        for path in self.paths:
            found.setdefault(path.name.lower(), []).append(path)
            if is_picture(path):
                found.setdefault(path.stem.lower(), []).append(path)
        return found

    def _pass_over_unreadable(self, error: OSError) -> None:
        self._pass_over("unreadable folder", str(error.filename))


def read_file(path: Path) -> bytes:
    """The content of a file.

    Raises:
        BadSampleError: "unreadable file", or "member too large" for a shard.
    """
    try:
        return read_input(path, _MAX_BYTES)
    except DataError as error:
        raise BadSampleError("member too large", error.cause) from error
    except LdmError as error:
        raise BadSampleError("unreadable file", error.cause or "there is no such file") from error
