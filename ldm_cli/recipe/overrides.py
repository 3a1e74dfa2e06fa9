"""Changes to a recipe from the command line: `train.lr=1e-4`, `eval.zero_shot.0.name=color`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ldm_cli.errors import is_secret
from ldm_cli.recipe.problems import describe
from ldm_cli.recipe.yaml_source import Path, YamlSource, dotted, parse_yaml

_MAX_SHOWN = 80


@dataclass
class Draft:
    """A recipe before validation: its data, and the place of each part in the sources."""

    data: Any
    keys: dict[Path, str] = field(default_factory=dict)
    values: dict[Path, str] = field(default_factory=dict)
    quoted: set[Path] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    @classmethod
    def from_source(cls, source: YamlSource, name: str) -> Draft:
        """The recipe of a file; places become `name:line:col`."""
        return cls(
            data=source.data,
            keys={path: f"{name}:{mark.line}:{mark.column}" for path, mark in source.keys.items()},
            values={path: f"{name}:{mark.line}:{mark.column}" for path, mark in source.values.items()},
            quoted=source.quoted,
            problems=[f"{name}:{p.mark.line}:{p.mark.column}: {p.message}" for p in source.problems],
        )

    def place(self, path: Path, at_key: bool) -> str:
        """The place of `path` in the sources; of something absent, the place of its nearest parent."""
        while path:
            found = self.keys.get(path) if at_key else self.values.get(path, self.keys.get(path))
            if found:
                return found
            path, at_key = path[:-1], True
        return self.values.get((), "")

    def assign(self, path: Path, source: YamlSource, place: str) -> None:
        """Put `source` at `path` and create the mappings on the way; notes a problem if that fails."""
        try:
            self.data = _assigned(self.data, path, source.data)
        except _CannotAssignError as error:
            self.problems.append(f"{place}: {dotted(path)}: {error}")
            return
        for places in (self.keys, self.values):
            for old in [old for old in places if old[: len(path)] == path]:
                del places[old]
        self.quoted = {old for old in self.quoted if old[: len(path)] != path}
        for length in range(1, len(path) + 1):
            self.keys.setdefault(path[:length], place)
        self.values[path] = place
        self.keys.update({path + inner: place for inner in source.keys})
        self.values.update({path + inner: place for inner in source.values})
        self.quoted |= {path + inner for inner in source.quoted}


def apply_override(draft: Draft, override: str) -> None:
    """Apply `key=value`; the value follows the rules of the recipe's YAML."""
    name, equals, text = override.partition("=")
    shown = f"{name}=…" if is_secret(name) else override
    shown = shown if len(shown) <= _MAX_SHOWN else shown[: _MAX_SHOWN - 1] + "…"
    place = f"override '{shown}'"
    if not equals or not all(name.split(".")):
        draft.problems.append(f"{place}: expected key=value, such as train.lr=1e-4")
        return
    source = parse_yaml(text)
    if source.problems:
        message = "not valid YAML" if is_secret(name) else source.problems[0].message
        draft.problems.append(f"{place}: {name}: {message} (text may need quotes)")
        return
    draft.assign(tuple(int(part) if part.isdecimal() else part for part in name.split(".")), source, place)


class _CannotAssignError(Exception):
    pass


def _assigned(data: Any, path: Path, value: Any) -> Any:
    """`data` with `value` at `path`; containers on the way are copied."""
    if not path:
        return value
    head, rest = path[0], path[1:]
    if isinstance(head, int):
        entries = [] if data is None else data
        if not isinstance(entries, list):
            raise _CannotAssignError(f"expected a list to take entry {head} of, found {describe(data)}")
        if head > len(entries):
            raise _CannotAssignError(f"expected an entry 0 to {len(entries)}, found {head}")
        old = entries[head] if head < len(entries) else None
        return [*entries[:head], _assigned(old, rest, value), *entries[head + 1 :]]
    section = {} if data is None else data
    if not isinstance(section, dict):
        raise _CannotAssignError(f"expected a mapping to set '{head}' in, found {describe(data)}")
    return {**section, head: _assigned(section.get(head), rest, value)}
