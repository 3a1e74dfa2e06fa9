"""Find the shard files that a recipe names by paths, globs, folders and brace patterns."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from ldm_cli.data.remote import without_credentials
from ldm_cli.errors import InputNotFoundError, RecipeError, UnavailableError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://|(pipe):")
PIPE = "pipe:"
"""Prefix of a source that is the output of a command."""

_MAX_PATHS = 1_000_000
_MAX_LISTED = 10


def expand_braces(pattern: str) -> Iterator[str]:
    """`a{00..02}` → a00, a01, a02; `{x,y}` → x, y; several braces multiply, the rightmost running fastest.

    Braces with neither a range nor a comma are plain text.

    Raises:
        RecipeError: the pattern has more than a million paths.
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
            raise RecipeError(f"shard pattern '{pattern}' is too long", f"it has more than {_MAX_PATHS:,} paths")
        choices = [f"{n:0{width}}" for n in range(first, last + step, step)] if numbers else match[1].split(",")
        pieces += [[pattern[end : match.start()]], choices]
        end = match.end()
    pieces.append([pattern[end:]])
    return ("".join(parts) for parts in itertools.product(*pieces))


def find_sources(
    patterns: str | tuple[str, ...], schemes: tuple[str, ...] = (), fetch: Callable[[str], Path] | None = None
) -> tuple[tuple[Path, ...], ...]:
    """The shard files of each of `patterns`; globs and folders in sorted order, each file once.

    Args:
        patterns: from the recipe.
        schemes: of the addresses that may be fetched.
        fetch: returns the local copy of a remote shard.

    Raises:
        InputNotFoundError: a pattern matches nothing, or files are missing, empty or unreadable; all are
            listed.
        UnavailableError: a pattern names a remote or piped source that is not allowed.
        LdmError: as `fetch`.
    """
    seen: set[str] = set()
    sources: list[tuple[Path, ...]] = []
    problems: list[str] = []
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        remote = _is_remote(pattern, schemes)
        source: list[Path] = []
        for path in expand_braces(pattern):
            found = [fetch(path)] if remote and fetch else _local_files(path)
            if not found:
                problems.append(f"'{path}' ({_absence(path)})")
            for file in found:
                reason = _unreadable(file)
                if reason:
                    problems.append(f"'{file}' ({reason})")
                if (real := os.path.realpath(file)) not in seen:
                    seen.add(real)
                    source.append(file)
        sources.append(tuple(source))
    _expect_none(problems)
    if not seen:
        raise InputNotFoundError("there are no shards", "data.shards is empty", "name at least one tar file")
    return tuple(sources)


def find_streams(patterns: str | tuple[str, ...], schemes: tuple[str, ...]) -> tuple[str, ...]:
    """The files, named pipes, addresses and commands of `patterns` for streaming, with repetitions.

    Args:
        patterns: from the recipe.
        schemes: of the addresses that may be read; `pipe` allows commands.

    Raises:
        InputNotFoundError, UnavailableError: as `find_sources`.
    """
    found: list[str] = []
    problems: list[str] = []
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        remote = _is_remote(pattern, schemes, streamed=True)
        for path in expand_braces(pattern):
            files = [] if remote else _local_files(path)
            if not files and not remote:
                problems.append(f"'{path}' ({_absence(path)})")
            problems += [f"'{file}' (no permission to read)" for file in files if not os.access(file, os.R_OK)]
            found += [path] if remote else map(str, files)
    _expect_none(problems)
    if not found:
        raise InputNotFoundError("there are no shards", "data.shards is empty", "name at least one tar file")
    return tuple(found)


def _expect_none(problems: list[str]) -> None:
    if problems:
        listed = ", ".join(problems[:_MAX_LISTED])
        more = f" and {len(problems) - _MAX_LISTED} more" if len(problems) > _MAX_LISTED else ""
        noun = "1 shard" if len(problems) == 1 else f"{len(problems)} shards"
        raise InputNotFoundError(
            f"cannot read {noun}", listed + more, "correct data.shards, or make or fetch the files"
        )


def shown_command(source: str) -> str:
    """A `pipe:COMMAND` for messages: only the program, as its arguments may be secret."""
    return f"{PIPE}{source[len(PIPE) :].strip().partition(' ')[0]} …"


def _is_remote(pattern: str, schemes: tuple[str, ...], streamed: bool = False) -> bool:
    """Whether a pattern is an address; raises UnavailableError if that is not allowed."""
    match = _SCHEME.match(pattern)
    if match is None:
        return False
    scheme = (match[1] or match[2]).lower()
    if scheme in schemes and (streamed or scheme != "pipe"):
        return True
    remedy = "copy the shards to a local folder and name that"
    if scheme == "pipe":
        shown = shown_command(pattern)
        remedy += ", or allow commands by data.stream=true data.remote_schemes=[pipe]"
    else:
        shown = without_credentials(pattern)
        remedy += f", or allow it by data.remote_schemes=[{scheme}]"
    raise UnavailableError(f"cannot read shards '{shown}'", f"'{scheme}:' is not allowed", remedy)


def _local_files(path: str) -> list[Path]:
    """A folder's tars, a glob's matches, or the path itself if it exists."""
    if Path(path).is_dir():
        return sorted(Path(path).glob("*.tar"))
    if Path(path).exists():
        return [Path(path)]
    if not glob.has_magic(path):
        return []
    # Brackets in the name of a folder that is there are no pattern.
    folder = next((parent for parent in Path(path).parents if parent.is_dir()), Path())
    pattern = f"{glob.escape(str(folder))}/{os.path.relpath(path, folder)}"
    return [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207


def _absence(path: str) -> str:
    if Path(path).is_dir():
        return "a folder without *.tar files"
    return "matches nothing" if glob.has_magic(path) else "missing"


def _unreadable(file: Path) -> str:
    """Why a file cannot be a shard, judged without opening it; empty if it can."""
    if not file.is_file():
        return "not a regular file"
    if not os.access(file, os.R_OK):
        return "no permission to read"
    return "" if file.stat().st_size else "empty"
