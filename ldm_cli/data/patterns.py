"""From what a recipe says to a list of shard files: paths, globs, folders and brace patterns."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ldm_cli.errors import InputNotFoundError, RecipeError, UnavailableError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://|(pipe):")
_MAX_PATHS = 1_000_000
_MAX_LISTED = 10


def expand_braces(pattern: str) -> Iterator[str]:
    """`a{00..02}` → a00, a01, a02; `{x,y}` → x, y; several braces multiply, the rightmost running fastest.

    A brace with neither a range nor a comma stands for itself.

    Raises:
        RecipeError: the pattern means more than a million paths.
    """
    pieces: list[list[str]] = []
    end, total = 0, 1
    for match in _BRACES.finditer(pattern):
        numbers = _RANGE.fullmatch(match[1])
        if numbers:
            first, last = int(numbers[1]), int(numbers[2])
            count, step = abs(last - first) + 1, 1 if last >= first else -1
            width = len(numbers[1]) if numbers[1].startswith("0") or len(numbers[1]) == len(numbers[2]) else 0
        elif "," in match[1]:
            count = match[1].count(",") + 1
        else:
            continue
        total *= count
        if total > _MAX_PATHS:
            raise RecipeError(f"shard pattern '{pattern}' is too long", f"it means more than {_MAX_PATHS:,} paths")
        choices = [f"{n:0{width}}" for n in range(first, last + step, step)] if numbers else match[1].split(",")
        pieces += [[pattern[end : match.start()]], choices]
        end = match.end()
    pieces.append([pattern[end:]])
    return ("".join(parts) for parts in itertools.product(*pieces))


def find_shards(patterns: str | tuple[str, ...]) -> tuple[Path, ...]:
    """The shard files that `patterns` mean, in the order given; globs and folders in sorted order, each file
    once.

    Raises:
        InputNotFoundError: a pattern matches nothing, or files are missing, empty or unreadable; all are
            listed.
        UnavailableError: a pattern names a remote or piped source.
    """
    paths: dict[str, Path] = {}
    problems: list[str] = []
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        _refuse_remote(pattern)
        for path in expand_braces(pattern):
            found = _local_files(path)
            if not found:
                problems.append(f"'{path}' ({_absence(path)})")
            for file in found:
                reason = _unreadable(file)
                if reason:
                    problems.append(f"'{file}' ({reason})")
                paths.setdefault(os.path.realpath(file), file)
    if problems:
        listed = ", ".join(problems[:_MAX_LISTED])
        more = f" and {len(problems) - _MAX_LISTED} more" if len(problems) > _MAX_LISTED else ""
        noun = "1 shard" if len(problems) == 1 else f"{len(problems)} shards"
        raise InputNotFoundError(
            f"cannot read {noun}", listed + more, "correct data.shards, or make or fetch the files"
        )
    if not paths:
        raise InputNotFoundError("there are no shards", "data.shards is empty", "name at least one tar file")
    return tuple(paths.values())


def _refuse_remote(pattern: str) -> None:
    scheme = _SCHEME.match(pattern)
    if scheme:
        raise UnavailableError(
            f"cannot read shards '{pattern}'",
            f"sources of the kind '{scheme[1] or scheme[2]}:' are not supported",
            "copy the shards to a local folder and name that",
        )


def _local_files(path: str) -> list[Path]:
    """A folder's tars, a glob's matches, or the path itself if it exists."""
    if Path(path).is_dir():
        return sorted(Path(path).glob("*.tar"))
    if Path(path).exists():
        return [Path(path)]
    if glob.has_magic(path):
        return [Path(match) for match in sorted(glob.glob(path, recursive=True))]  # noqa: PTH207
    return []


def _absence(path: str) -> str:
    if Path(path).is_dir():
        return "a folder without *.tar files"
    return "matches nothing" if glob.has_magic(path) else "missing"


def _unreadable(file: Path) -> str:
    """Why a file cannot be a shard, seen from outside; empty if it can."""
    if not file.is_file():
        return "not a regular file"
    if not os.access(file, os.R_OK):
        return "no permission to read"
    return "" if file.stat().st_size else "empty"
