"""Results on stdout: tables for people, one JSON object for programs."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from ldm_cli.cli.streams import is_utf8, write_result
from ldm_cli.errors import amount, printable

if TYPE_CHECKING:
    from rich.table import Table

    from ldm_cli.recipe.load import LoadedRecipe

_PIPE_WIDTH = 4096
_PADDING = 3
"""Of a column, with the border beside it."""
_BLANKS_AT_THE_END = re.compile(r" +(?=(?:\x1b\[[\d;]*m| )*$)")
"""Of a line, which may end with codes of colours."""
Section = tuple[str, "Table"]
"""A title, which may be empty, and the table below it."""


def show_result(result: Mapping[str, Any], as_json: bool) -> None:
    """A stage's result: single values in one table, nested ones and lists in tables of their own."""
    if as_json:
        text = json.dumps(_finite(result), indent=2, ensure_ascii=not is_utf8(), allow_nan=False, default=str)
        write_result(text + "\n")
        return
    write_result(_rendered(_sections("", result)))


def show_dry_run(loaded: LoadedRecipe, as_json: bool, num_ranks: int = 1, measured_on: str | None = None) -> None:
    """`--dry-run`: memory and data of each rank, and the fields that the recipe changes; as JSON every field.

    Args:
        loaded: the recipe.
        as_json: whether for programs.
        num_ranks: how many train together.
        measured_on: device on which to time some steps; None: none are taken.
    """
    from ldm_cli.cli.report import make_reporter
    from ldm_cli.recipe.yaml_source import to_yaml
    from ldm_cli.stages.dry_run import dry_run

    result = dry_run(loaded.recipe, make_reporter(), num_ranks)
    if measured_on is not None:
        from ldm_cli.stages.measure import measure
        from ldm_cli.stages.support.options import RunOptions

        num_samples = result.get("shards", {}).get("num_samples")
        recipe: Any = loaded.recipe
        result["measured"] = measure(recipe, RunOptions(device=measured_on), num_samples, make_reporter())
    if as_json:
        show_result(result, as_json=True)
        return
    notes, _, sizes = result.pop("notes"), result.pop("recipe"), result.pop("bytes", {})
    if "memory" in result:
        memory = result.pop("memory")
        options = {f"with {setting}": amount(size) for setting, size in memory.pop("with").items()}
        shown = {name: amount(size) for name, size in memory.items()} | options
        result = {"memory": shown | {"in main memory while saving": amount(sizes["save"])}} | result
    elif any(sizes.values()):
        result = {"memory": {name: amount(size) for name, size in sizes.items()}} | result
    if "epochs" in result:
        result["shards"] |= {name: result.pop(name) for name in ("steps_per_epoch", "epochs")}
    show_result(result, as_json=False)
    write_result("".join(f"note: {printable(note)}\n" for note in notes))
    changed = loaded.recipe.model_dump(mode="json", exclude_unset=True, exclude_defaults=True)
    write_result("\n" + to_yaml(changed, ascii_only=not is_utf8()))


def _is_compound(value: Any) -> bool:
    """Whether a value gets a table of its own; empty ones do not."""
    if isinstance(value, Mapping):
        return len(value) > 0
    return isinstance(value, list | tuple) and any(isinstance(entry, Mapping) for entry in value)


def _is_empty(value: Any) -> bool:
    """Whether a row would say nothing, or a cell of a column."""
    return value is None or (isinstance(value, list | tuple | Mapping | str) and not value)


def _sections(title: str, value: Any) -> list[Section]:
    """A mapping as pairs, followed by its nested mappings; records as rows; nothing for empty values."""
    if not isinstance(value, Mapping):
        return [(title, _rows(value))]
    children = list(value.values())
    is_grid = len(children) > 1 and all(isinstance(v, Mapping) and not _holds_compound(v) for v in children)
    if title and is_grid:
        return [(title, _rows([{"": name, **fields} for name, fields in value.items()]))]
    single = {name: v for name, v in value.items() if not (_is_compound(v) or _is_empty(v))}
    sections = [(title, _pairs(single))] if single else []
    inner = [(f"{title} / {name}" if title else name, v) for name, v in value.items() if _is_compound(v)]
    return sections + [section for name, v in inner for section in _sections(name, v)]


def _holds_compound(values: Mapping[str, Any]) -> bool:
    return any(_is_compound(value) for value in values.values())


def _pairs(values: Mapping[str, Any]) -> Table:
    table = _new_table(show_header=False)
    table.add_column(style="bold")
    table.add_column(justify=_justify(values.values()), overflow="fold")
    for name, value in values.items():
        table.add_row(_cell(_label(name)), _cell(value))
    return table


def _rows(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = _new_table(show_header=True)
    names = list(dict.fromkeys(name for row in rows for name, value in row.items() if not _is_empty(value)))
    for name in names:
        justify = _justify(row.get(name, 0) for row in rows)
        table.add_column(_cell(_label(name)), justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(name, "")) for name in names))
    return table


def _new_table(show_header: bool) -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, show_header=show_header, show_edge=False)


def _label(name: str) -> str:
    """A field's name with spaces; other texts unchanged."""
    return name.replace("_", " ") if name.isidentifier() else name


def _cell(value: Any) -> Any:
    """Text for a table, safe on a terminal and without markup."""
    from rich.text import Text

    if isinstance(value, bool) or value is None:
        text = {True: "yes", False: "no", None: "-"}[value]
    elif isinstance(value, int):
        text = f"{value:,}"
    elif isinstance(value, float):
        text = f"{value:.4g}"
    elif isinstance(value, list | tuple | Mapping) and not value:
        text = "-"
    elif isinstance(value, list | tuple):
        texts = [printable(f"{entry:.4g}" if isinstance(entry, float) else str(entry)) for entry in value]
        return Text(("\n" if any(map(_is_path, texts)) else ", ").join(texts))
    else:
        text = str(value)
    return Text(printable(text))


def _is_path(text: str) -> bool:
    """Whether a text is a path, which may have blanks, or an address."""
    return "/" in text.partition(" ")[0]


def _justify(values: Iterable[Any]) -> Literal["left", "right"]:
    return "right" if all(map(_is_number, values)) else "left"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _finite(value: Any) -> Any:
    """The value with null in place of NaN and infinity, which JSON lacks."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(name): _finite(inner) for name, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def _set_widths(table: Table, room: int) -> None:
    """Share out `room` columns of the screen, and break no word and no path, so that they can be copied.

    Where one is too long for that, no cell is wrapped, and the terminal wraps the lines.
    """
    from rich.cells import cell_len

    least, most = [], []
    for column in table.columns:
        lines = [line for cell in (column.header, *column.cells) for line in str(cell).splitlines()]
        unbroken = [part for line in lines for part in ([line] if _is_path(line) else line.split())]
        least.append(max((cell_len(part) for part in unbroken if part.isascii() or _is_path(part)), default=0))
        most.append(max(map(cell_len, lines), default=0))
    room -= sum(least) + _PADDING * len(least)
    if room < 0:
        return
    order = sorted(range(len(least)), key=lambda number: most[number] - least[number])
    for place, number in enumerate(order):
        more = min(most[number] - least[number], room // (len(order) - place))
        table.columns[number].width = max(1, least[number] + more)
        room -= more


def _rendered(sections: Sequence[Section]) -> str:
    """Titles and tables as text: in colour and wrapped on a terminal, without wrapping in a pipe."""
    from rich import box
    from rich.console import Console
    from rich.text import Text

    on_terminal = sys.stdout.isatty()
    target = io.TextIOWrapper(io.BytesIO(), encoding=sys.stdout.encoding, errors="backslashreplace")
    width = shutil.get_terminal_size().columns if on_terminal else _PIPE_WIDTH
    console = Console(
        file=target,
        width=_PIPE_WIDTH,
        force_terminal=on_terminal and os.environ.get("TERM", "dumb") != "dumb",
        highlight=False,
    )
    for number, (title, table) in enumerate(sections):
        if number > 0:
            console.print()
        if title:
            console.print(Text(printable(" / ".join(map(_label, title.split(" / ")))), style="bold"), soft_wrap=True)
        _set_widths(table, width)
        console.print(table)
    target.flush()
    text, rule = target.buffer.getvalue().decode(target.encoding), box.SIMPLE_HEAD.head_row_horizontal
    lines = [_BLANKS_AT_THE_END.sub("", line) if line.strip(rule) else line[:width] for line in text.splitlines()]
    return "\n".join(lines) + "\n"
