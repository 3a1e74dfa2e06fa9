"""From prompts and wishes to the list of pictures of a job, and the sheets on which they are shown together."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Self

from pydantic import Field, JsonValue, PrivateAttr, ValidationError

from ldm_cli.config import Config, causes
from ldm_cli.errors import LdmError, UsageError
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.edit_config import EditConfig
from ldm_cli.sampling.request import Blend, ImageRequest, variations, walk

_MOST_PICTURES = 100_000
_FRAMES_BETWEEN = 7
"""Pictures from one embedded picture to the other, the last one not counted, where no number is given."""


class PromptEntry(Config):
    """A prompt with settings of its own."""

    prompt: str
    """The text."""
    sampling: dict[str, JsonValue] = Field(default_factory=dict)
    """What differs from the recipe's `sampling`, by field: `steps`, `guidance.scale`, `negative`, …"""
    blend: Blend | None = None
    """A second prompt and seed to mix in."""
    _line: str = PrivateAttr(default="")

    def at_line(self, line: str) -> Self:
        """This entry, whose messages begin with `line`, as in `prompts.txt:7`."""
        self._line = line
        return self

    @property
    def place(self) -> str:
        """Which prompt this is, for messages."""
        return f"{self._line}: " * bool(self._line) + f"prompt {self.prompt[:40]!r}"


@dataclass(frozen=True)
class Item:
    """One picture of a job: what, how, and on what.

    Attributes:
        request: prompt and seed.
        sampling: sampler, guidance, size.
        edit: the picture to work on.
        loras: names and weights of adapters, sorted, none 0.
        place: which prompt it is of, for messages; empty: of several.
    """

    request: ImageRequest
    sampling: SamplingConfig
    edit: EditConfig
    loras: tuple[tuple[str, float], ...] = ()
    place: str = field(default="", compare=False)


@contextmanager
def errors_at(place: str) -> Iterator[None]:
    """Begin the messages of errors with a place, if it is not empty."""
    try:
        yield
    except LdmError as error:
        error.what = f"{place}: {error.what}" if place else error.what
        raise


@dataclass(frozen=True)
class Sheet:
    """Pictures that belong side by side.

    Attributes:
        items: their indices in the job, row by row.
        columns: pictures per row; None makes the sheet nearly square.
        column_labels, row_labels: texts at the edges, or none.
        axis_names: what the labels are values of, from left to right and from top to bottom.
        title: text above the sheet, if it has labels.
        is_walk: whether the pictures follow one another in time.
    """

    items: tuple[int, ...]
    columns: int | None = None
    column_labels: tuple[str, ...] = ()
    row_labels: tuple[str, ...] = ()
    axis_names: tuple[str, str] = ("", "")
    title: str = ""
    is_walk: bool = False


@dataclass(frozen=True)
class Job:
    """The pictures to generate, in order, and how they are shown together."""

    items: tuple[Item, ...]
    sheets: tuple[Sheet, ...]


def make_job(
    prompts: Sequence[str | PromptEntry],
    sampling: SamplingConfig,
    edit: EditConfig,
    variation: float = 0.0,
    frames: int = 0,
    axes: Sequence[str] = (),
) -> Job:
    """The pictures of a job.

    Args:
        prompts: at least one.
        sampling, edit: for all of them; entries and axes may differ.
        variation: how far the images of a prompt lean from the first towards their own seeds; 0: all the way, plainly.
        frames: pictures from each prompt to the next; 0: no walks.
        axes: up to two of `field=a,b,c`: a picture for every value of the first (from left to right) and the second
            (from top to bottom).

    Raises:
        UsageError: wishes that contradict one another, or values that cannot be.
    """
    entries = [PromptEntry(prompt=p) if isinstance(p, str) else p for p in prompts]
    if len(edit.embedded) == 2 and (variation > 0 or axes):
        raise UsageError("two pictures to go between do not go with --variation or --xy", remedy="give one picture")
    if (variation > 0) + (frames > 0) + bool(axes) > 1:
        raise UsageError("--variation, --interpolate and --xy do not go together", remedy="give one of them")
    if len(edit.embedded) == 2 and not any(entry.blend for entry in entries):
        return _between(entries, sampling, edit, frames or _FRAMES_BETWEEN)
    if frames:
        return _walks(entries, sampling, edit, frames)
    if axes:
        return _crossed(entries, sampling, edit, [parse_axis(axis) for axis in axes])
    items: list[Item] = []
    for entry in entries:
        own, its_edit = with_changes(sampling, edit, entry.sampling, entry.place)
        items += [Item(request, own, its_edit, place=entry.place) for request in _requests(entry, own, variation)]
        _check_size(len(items))
    # A row per prompt, if there are rows at all.
    columns = sampling.images_per_prompt if sampling.images_per_prompt > 1 and len(entries) > 1 else None
    return Job(tuple(items), (Sheet(tuple(range(len(items))), columns),))


def parse_axis(text: str) -> tuple[str, list[str]]:
    """`steps=10,20,50` → the field and its values, as text.

    Raises:
        UsageError: it is not of that form.
    """
    name, equals, values = text.partition("=")
    found = [value.strip() for value in values.split(",")]
    if not equals or not name or not all(found):
        raise UsageError(f"--xy '{text}' is not understood", remedy="write FIELD=A,B,C, such as steps=10,20,50")
    return name.strip(), found


def with_changes(
    sampling: SamplingConfig, edit: EditConfig, changes: Mapping[str, Any], where: str
) -> tuple[SamplingConfig, EditConfig]:
    """The configurations with some fields changed.

    Args:
        sampling, edit: the configurations.
        changes: values by field: `steps`, `guidance.scale`, `sampling.steps`, `edit.strength`.
        where: who asks, for the message.

    Raises:
        UsageError: an unknown field, or a value that cannot be.
    """
    if not changes:
        return sampling, edit
    mapping = {"sampling": sampling.to_mapping(), "edit": edit.to_mapping()}
    for name, value in changes.items():
        path = name.split(".") if name.split(".")[0] in mapping else ["sampling", *name.split(".")]
        section: Any = mapping
        for part in path[:-1]:
            section = section.get(part) if isinstance(section, dict) else None
        if not isinstance(section, dict) or path[-1] not in section:
            raise UsageError(f"{where}: there is no field '{name}'", remedy="see ldm recipe fields sample sampling")
        section[path[-1]] = value
    try:
        return SamplingConfig.from_mapping(mapping["sampling"]), EditConfig.from_mapping(mapping["edit"])
    except ValidationError as error:
        raise UsageError(f"{where} cannot be", "; ".join(causes(error))) from error


def value_of(text: str) -> Any:
    """What a word means: a number, true, false, null, else itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _requests(entry: PromptEntry, sampling: SamplingConfig, variation: float) -> list[ImageRequest]:
    _check_size(sampling.images_per_prompt)
    if variation > 0:
        return variations(entry.prompt, sampling, variation)
    return [ImageRequest(entry.prompt, sampling.seed + i, entry.blend) for i in range(sampling.images_per_prompt)]


def _walks(entries: list[PromptEntry], sampling: SamplingConfig, edit: EditConfig, frames: int) -> Job:
    """A walk through all prompts per image; at each further prompt the seeds are `images_per_prompt` higher."""
    if len(entries) < 2:
        raise UsageError("one prompt is no walk", remedy="give --interpolate two prompts or more")
    if any(entry.sampling or entry.blend for entry in entries):
        raise UsageError("prompts of a walk have no settings of their own", remedy="give them for all")
    count, prompts = sampling.images_per_prompt, [entry.prompt for entry in entries]
    _check_size(count * (frames * (len(prompts) - 1) + 1))
    items: list[Item] = []
    sheets: list[Sheet] = []
    for i in range(count):
        seeds = [sampling.seed + i + k * count for k in range(len(prompts))]
        frames_of_walk = [Item(request, sampling, edit) for request in walk(prompts, seeds, frames)]
        first = len(items)
        items += frames_of_walk
        sheets.append(Sheet(tuple(range(first, len(items))), len(frames_of_walk), is_walk=True))
    return Job(tuple(items), tuple(sheets))


def _between(entries: list[PromptEntry], sampling: SamplingConfig, edit: EditConfig, frames: int) -> Job:
    """A walk from one embedded picture to the other for each prompt and seed."""
    items: list[Item] = []
    sheets: list[Sheet] = []
    for entry, i in product(entries, range(sampling.images_per_prompt)):
        first = len(items)
        own, its_edit = with_changes(sampling, edit, entry.sampling, entry.place)
        for k in range(frames + 1):
            blend = Blend(prompt=entry.prompt, seed=own.seed + i, weight=k / frames)
            items.append(Item(ImageRequest(entry.prompt, own.seed + i, blend), own, its_edit, place=entry.place))
        _check_size(len(items))
        sheets.append(Sheet(tuple(range(first, len(items))), frames + 1, is_walk=True))
    return Job(tuple(items), tuple(sheets))


def _crossed(
    entries: list[PromptEntry], sampling: SamplingConfig, edit: EditConfig, axes: list[tuple[str, list[str]]]
) -> Job:
    """A sheet per prompt and seed, a picture on it per pair of values."""
    if len(axes) > 2 or len({name for name, _ in axes}) < len(axes):
        raise UsageError(f"--xy is given for {', '.join(name for name, _ in axes)}", remedy="give two different fields")
    (x_name, xs), (y_name, ys) = axes[0], axes[1] if len(axes) == 2 else ("", [""])
    items: list[Item] = []
    sheets: list[Sheet] = []
    for entry, i in product(entries, range(sampling.images_per_prompt)):
        first, where = len(items), "--xy"
        for y, x in product(ys, xs):
            changes = {**entry.sampling, x_name: value_of(x)} | ({y_name: value_of(y)} if y_name else {})
            own, its_edit = with_changes(sampling, edit, changes, where)
            items.append(Item(ImageRequest(entry.prompt, own.seed + i, entry.blend), own, its_edit, place=entry.place))
            _check_size(len(items))
        title = f"{entry.prompt}, seed {items[first].request.seed}"
        sheets.append(Sheet(tuple(range(first, len(items))), len(xs), tuple(xs), tuple(ys), (x_name, y_name), title))
    return Job(tuple(items), tuple(sheets))


def _check_size(count: int) -> None:
    if count > _MOST_PICTURES:
        raise UsageError(f"a job of more than {_MOST_PICTURES:,} pictures", remedy="split it into several")
