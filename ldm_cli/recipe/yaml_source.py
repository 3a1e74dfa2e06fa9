"""A strict YAML: plain data, every value with its line and column, nothing other than what it looks like.

PyYAML reads `1e-4` as text, `no` as False, `010` as 8, `12:30:00` as 45000 and lets duplicate keys win. Here
the parser's events are read instead of its objects: `1e-4` is a number; only `true` and `false` are booleans;
`010`, `0o10`, `12:30:00`, `2020-01-01` are text; tags, anchors, aliases, duplicate keys and several documents
are problems.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

Path = tuple[str | int, ...]
"""Where a value is in the data: `("train", "betas", 0)`."""

MAX_BYTES = 2**18
MAX_DEPTH = 32

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,30})")
_NUMBER = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]{1,3})?")
_SPECIAL: dict[str, Any] = {"true": True, "false": False, "null": None, "~": None, "": None}


@dataclass(frozen=True)
class Mark:
    """Line and column of a value or key, counted from 1."""

    line: int
    column: int


@dataclass(frozen=True)
class YamlProblem:
    """A reason why the text is no valid YAML for a recipe, and its place."""

    mark: Mark
    message: str


@dataclass
class YamlSource:
    """Plain data (dict, list, str, int, float, bool, None) and the place of each part."""

    data: Any = None
    keys: dict[Path, Mark] = field(default_factory=dict)
    """Place of each key or list entry."""
    values: dict[Path, Mark] = field(default_factory=dict)
    """Place of each value."""
    quoted: set[Path] = field(default_factory=set)
    """Texts that were written in quotes or as a block."""
    problems: list[YamlProblem] = field(default_factory=list)


def parse_yaml(text: str) -> YamlSource:
    """Read one YAML document; errors go into `problems` and are never raised."""
    source = YamlSource()
    if len(text) > MAX_BYTES:
        source.problems.append(YamlProblem(Mark(1, 1), f"expected at most {MAX_BYTES} bytes, found {len(text)}"))
        return source
    try:
        _Reader(source, text).read()
    except yaml.MarkedYAMLError as error:
        found = error.problem or "cannot be read"
        context = f" {error.context}," if error.context else ":"
        place = _mark(error.problem_mark or error.context_mark)
        source.problems.append(YamlProblem(place, f"not valid YAML{context} {found}"))
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        place = Mark(before.count("\n") + 1, error.position - before.rfind("\n"))
        source.problems.append(YamlProblem(place, f"not valid YAML: character U+{ord(text[error.position]):04X}"))
    except _UnreadableError as error:
        source.problems.append(error.problem)
    return source


def resolve_scalar(text: str) -> Any:
    """The value of an unquoted text.

    >>> [resolve_scalar(text) for text in ("1e-4", "010", "no", "true", "~", "-3")]
    [0.0001, '010', 'no', True, None, -3]
    """
    if text in _SPECIAL:
        return _SPECIAL[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _NUMBER.fullmatch(text) and abs(float(text)) != float("inf"):
        return float(text)
    return text


class _UnreadableError(Exception):
    def __init__(self, mark: Mark, message: str) -> None:
        super().__init__(message)
        self.problem = YamlProblem(mark, message)


def _mark(mark: Any) -> Mark:
    """Our mark for one of PyYAML, which counts from 0 and may be None."""
    return Mark(mark.line + 1, mark.column + 1) if mark else Mark(1, 1)


class _Reader:
    """Turns parser events into data; nesting is bounded."""

    def __init__(self, source: YamlSource, text: str) -> None:
        self.source = source
        self.events: Iterator[Any] = yaml.parse(text, Loader=yaml.SafeLoader)

    def read(self) -> None:
        """Read the document."""
        num_documents = 0
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                num_documents += 1
                if num_documents > 1:
                    self.problem(_mark(event.start_mark), "expected one document, found a second one")
                    return
            elif isinstance(event, yaml.NodeEvent):
                self.source.data = self.value(event, ())

    def problem(self, mark: Mark, message: str) -> None:
        """Note a problem and continue."""
        self.source.problems.append(YamlProblem(mark, message))

    def value(self, event: yaml.NodeEvent, path: Path) -> Any:
        """The value that begins with this event."""
        mark = self.source.values[path] = self.plain(event)
        if isinstance(event, yaml.AliasEvent):
            return None
        if isinstance(event, yaml.ScalarEvent):
            if any("\ud800" <= c <= "\udfff" for c in event.value):
                self.problem(mark, "expected text, found half a surrogate pair")
            if event.style is None:
                return resolve_scalar(event.value)
            self.source.quoted.add(path)
            return event.value
        if len(path) == MAX_DEPTH:
            raise _UnreadableError(mark, f"expected at most {MAX_DEPTH} levels, found more")
        return self.mapping(path) if isinstance(event, yaml.MappingStartEvent) else self.sequence(path)

    def plain(self, event: yaml.NodeEvent) -> Mark:
        """The place of a node, which must have neither alias, anchor nor tag."""
        mark = _mark(event.start_mark)
        if isinstance(event, yaml.AliasEvent):
            self.problem(mark, f"expected a value, found the alias '*{event.anchor}' (write it out, or quote it)")
        elif event.anchor is not None:
            self.problem(mark, f"expected a value, found the anchor '&{event.anchor}' (write it out, or quote it)")
        if (tag := getattr(event, "tag", None)) is not None:
            self.problem(mark, f"expected a plain value, found the tag '{tag}'")
        return mark

    def sequence(self, path: Path) -> list[Any]:
        """The entries up to the end of a list."""
        entries: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            entry = (*path, len(entries))
            self.source.keys[entry] = _mark(event.start_mark)
            entries.append(self.value(event, entry))
        return entries

    def mapping(self, path: Path) -> dict[str, Any]:
        """Keys, which are always text, and values up to the end of a mapping."""
        found: dict[str, Any] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            mark = self.plain(event)
            if not isinstance(event, yaml.ScalarEvent):
                kind = "a list" if isinstance(event, yaml.SequenceStartEvent) else "a mapping"
                raise _UnreadableError(mark, f"not valid YAML: a key must be a name, not {kind}")
            key = (*path, event.value)
            if key in self.source.keys:
                first = self.source.keys[key]
                self.problem(mark, f"{dotted(key)}: duplicate key, first given at line {first.line}")
            self.source.keys[key] = mark
            found[event.value] = self.value(next(self.events), key)
        return found


def to_yaml(data: Any, ascii_only: bool = False) -> str:
    """Plain data as YAML that `parse_yaml` reads back unchanged."""
    return yaml.dump(
        data,
        Dumper=_Dumper,
        sort_keys=False,
        default_flow_style=None,
        allow_unicode=not ascii_only,
        width=100,
    )


class _Dumper(yaml.SafeDumper):
    """PyYAML's dumper with quotes around every text that our reader would not read as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.MappingNode:
        return super().represent_mapping(tag, mapping, flow_style=False)

    def represent_text(self, text: str) -> yaml.ScalarNode:
        style = None if isinstance(resolve_scalar(text), str) else "'"
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)


def dotted(path: Path) -> str:
    """`("train", "betas", 0)` → `train.betas.0`."""
    return ".".join(str(part) for part in path)
