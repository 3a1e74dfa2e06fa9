"""All problems of a recipe at once: a wrong field hides the checks of its section, a failed check those after it."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from pydantic import ValidationError

from ldm_cli.config import Config
from ldm_cli.recipe.problems import Problem, find_problems
from ldm_cli.recipe.yaml_source import Path

_SUBSTITUTES: tuple[Any, ...] = (1, "a", {}, ["a"])
"""Values that a required field may take while the others are checked."""
_MOST_ROUNDS = 100


def every_problem(error: ValidationError, model: type[Config], data: Any, quoted: set[Path]) -> list[Problem]:
    """The problems in `error`, and those that come to light when what they blame is left out.

    A problem that names a field which was left out is none: it may follow from the default in its place.

    Args:
        error: of validating `data` as `model`.
        quoted: paths of the texts that were written in quotes.
    """
    found: list[Problem] = []
    attempts = Counter[Path]()
    for _ in range(_MOST_ROUNDS):
        names = {str(path[-1]) for path in attempts}
        problems = find_problems(error, model, data, quoted)
        found += [problem for problem in problems if not _follows(problem, attempts, names)]
        for path, meant in {_blamed(problem): problem.meant for problem in problems}.items():
            if not path or attempts[path] > len(_SUBSTITUTES):
                return found
            name = str(path[-1])
            section = _section(data, path[:-1])
            if section is None:
                continue
            if meant and meant not in section:
                data = _with(data, (*path[:-1], meant), section[name])
                attempts[(*path[:-1], meant)] += 1
            is_required = attempts[path] or name not in section
            data = _with(data, path, _SUBSTITUTES[max(0, attempts[path] - 1)]) if is_required else _without(data, path)
            attempts[path] += 1
        try:
            model.from_mapping(data)
        except ValidationError as further:
            error = further
        else:
            return found
    return found


def _blamed(problem: Problem) -> Path:
    """The field to leave out, or to give; of an entry the list that it is in."""
    path = (*problem.path, problem.missing) if problem.missing else problem.path
    return next((path[:length] for length in range(len(path)) if isinstance(path[length], int)), path)


def _follows(problem: Problem, changed: Counter[Path], names: set[str]) -> bool:
    path = _blamed(problem)
    if any(path[: len(other)] == other for other in changed):
        return True
    return not problem.missing and not names.isdisjoint(re.findall(r"\w+", problem.message))


def _section(data: Any, path: Path) -> dict[str, Any] | None:
    """The mapping at `path`; None if it was left out with another problem."""
    for part in path:
        data = data.get(part) if isinstance(data, dict) else None
    return data if isinstance(data, dict) else None


def _with(data: Any, path: Path, value: Any) -> Any:
    head, rest = path[0], path[1:]
    return {**data, head: _with(data[head], rest, value) if rest else value}


def _without(data: Any, path: Path) -> Any:
    head, rest = path[0], path[1:]
    if rest:
        return {**data, head: _without(data[head], rest)}
    return {name: value for name, value in data.items() if name != head}
