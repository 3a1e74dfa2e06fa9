"""Find the shard files that a recipe names by paths, globs, folders and brace patterns."""

from __future__ import annotations

import glob
import itertools
import os
import re
import stat
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise, starmap
from pathlib import Path

from ldm_cli.data.index_cache import stamp_from
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


@dataclass(frozen=True)
class Found:
    """The shards of a recipe.

    Attributes:
        names: their paths and addresses, each file once.
        stamps: three numbers each, as `stamp_from` has them; zeros for addresses.
        sources: the shards of each pattern.
    """

    names: list[str]
    stamps: array[int]
    sources: tuple[range, ...]


def find_sources(patterns: str | tuple[str, ...], schemes: tuple[str, ...] = ()) -> Found:
    """The shards of each of `patterns`; globs and folders in sorted order.

    Args:
        schemes: of the addresses that may be fetched; nothing is fetched here.

    Raises:
        InputNotFoundError: a pattern matches nothing, or files are missing, empty or unreadable; all are
            listed.
        UnavailableError: a pattern names a remote or piped source that is not allowed.
    """
    found = Found([], array("q"), ())
    seen: set[str] = set()
    problems: list[str] = []
    ends = [0]
    real_folder = lru_cache(maxsize=64)(os.path.realpath)
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        remote = _is_remote(pattern, schemes)
        for path in expand_braces(pattern):
            files = [path] if remote else _local_files(path)
            if not files:
                problems.append(f"'{path}' ({_absence(path)})")
            for file in files:
                status = None if remote else _status(file)
                if isinstance(status, str):
                    problems.append(f"'{file}' ({status})")
                    continue
                real = file if remote else _real(file, real_folder)
                if real not in seen:
                    seen.add(real)
                    found.names.append(file)
                    found.stamps.extend(stamp_from(status) if status else (0, 0, 0))
        ends.append(len(found.names))
    _expect_none(problems)
    if not seen:
        raise InputNotFoundError("there are no shards", "data.shards is empty", "name at least one tar file")
    return replace(found, sources=tuple(starmap(range, pairwise(ends))))


def _real(file: str, real_folder: Callable[[str], str]) -> str:
    """The path of a file without links; most shards of a set share a folder."""
    folder, name = os.path.split(file)
    return os.path.realpath(file) if os.path.islink(file) else f"{real_folder(folder)}/{name}"  # noqa: PTH114


def find_streams(patterns: str | tuple[str, ...], schemes: tuple[str, ...]) -> tuple[str, ...]:
    """The files, named pipes, addresses and commands of `patterns` for streaming, with repetitions.

    Args:
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
            found += [path] if remote else files
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


def _local_files(path: str) -> list[str]:
    """A folder's tars, a glob's matches, or the path itself if it exists."""
    try:
        is_folder = stat.S_ISDIR(os.stat(path).st_mode)  # noqa: PTH116
    except (OSError, ValueError):
        return _matches(path) if glob.has_magic(path) else []
    return sorted(map(str, Path(path).glob("*.tar"))) if is_folder else [path]


def _matches(path: str) -> list[str]:
    # Brackets in the name of a folder that is there are no pattern.
    folder = next((parent for parent in Path(path).parents if parent.is_dir()), Path())
    pattern = f"{glob.escape(str(folder))}/{os.path.relpath(path, folder)}"
    return sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207


def _absence(path: str) -> str:
    if Path(path).is_dir():
        return "a folder without *.tar files"
    return "matches nothing" if glob.has_magic(path) else "missing"


def _status(file: str) -> os.stat_result | str:
    """The status of a file that can be a shard, judged without opening it; else why it cannot."""
    try:
        status = os.stat(file)  # noqa: PTH116
    except OSError:
        return "not a regular file"
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file"
    if not os.access(file, os.R_OK):
        return "no permission to read"
    return status if status.st_size else "empty"
