"""Results on stdout: tables for people, one JSON object for programs."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ldm_cli.cli.streams import is_utf8, write_result
from ldm_cli.errors import printable

if TYPE_CHECKING:
    from rich.table import Table

    from ldm_cli.recipe.load import LoadedRecipe

_PIPE_WIDTH = 4096


def show_result(result: Mapping[str, Any], as_json: bool) -> None:
    """A stage's result: single values in one table, nested ones and lists in tables of their own."""
    if as_json:
        text = json.dumps(_finite(result), indent=2, ensure_ascii=not is_utf8(), allow_nan=False, default=str)
        write_result(text + "\n")
        return
    single = {name: value for name, value in result.items() if not _is_compound(value)}
    tables = [_pairs("", single)] if single else []
    tables += [
        table for name, value in result.items() if _is_compound(value) for table in _tables(name, value)
    ]
    write_result(_rendered(tables))


def show_rows(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table of records with the same fields."""
    write_result(_rendered([_rows(title, rows)]))


def show_plan(loaded: LoadedRecipe, as_json: bool) -> None:
    """`--dry-run`: the resolved recipe and what it would take."""
    from ldm_cli.cli.report import make_reporter
    from ldm_cli.recipe.yaml_source import to_yaml
    from ldm_cli.stages.plan import plan

    result = plan(loaded.recipe, make_reporter())
    if as_json:
        show_result(result, as_json=True)
        return
    write_result(to_yaml(result.pop("recipe"), ascii_only=not is_utf8()) + "\n")
    if "bytes" in result:
        result["memory"] = {name: _amount(size) for name, size in result.pop("bytes").items()}
    show_result(result, as_json=False)


def _is_compound(value: Any) -> bool:
    return isinstance(value, Mapping) or (
        isinstance(value, list | tuple) and any(isinstance(v, Mapping) for v in value)
    )


def _tables(title: str, value: Any) -> list[Table]:
    """A mapping as pairs, deeper ones after it; records as rows."""
    if not isinstance(value, Mapping):
        return [_rows(title, value)]
    children = list(value.values())
    if len(children) > 1 and all(
        isinstance(v, Mapping) and not any(map(_is_compound, v.values())) for v in children
    ):
        return [_rows(title, [{"": name, **fields} for name, fields in value.items()])]
    single = {name: v for name, v in value.items() if not _is_compound(v)}
    tables = [_pairs(title, single)] if single else []
    return tables + [
        table for name, v in value.items() if _is_compound(v) for table in _tables(f"{title} / {name}", v)
    ]


def _pairs(title: str, values: Mapping[str, Any]) -> Table:
    table = _new_table(title, show_header=False)
    table.add_column(style="bold")
    table.add_column(
        justify="right" if all(_is_number(v) for v in values.values()) else "left", overflow="fold"
    )
    for name, value in values.items():
        table.add_row(_cell(name.replace("_", " ")), _cell(value))
    return table


def _rows(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = _new_table(title)
    for name in names:
        numeric = all(_is_number(row.get(name, 0)) for row in rows)
        table.add_column(
            _cell(name.replace("_", " ")), justify="right" if numeric else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*(_cell(row.get(name, "")) for name in names))
    return table


def _new_table(title: str, show_header: bool = True) -> Table:
    from rich import box
    from rich.table import Table

    heading = printable(title.replace("_", " ")) or None
    return Table(
        title=heading, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_header=show_header
    )


def _cell(value: Any) -> Any:
    """Text for a table, safe on a terminal; never read as markup."""
    from rich.text import Text

    if isinstance(value, bool) or value is None:
        text = {True: "yes", False: "no", None: "-"}[value]
    elif isinstance(value, int):
        text = f"{value:,}"
    elif isinstance(value, float):
        text = f"{value:.4g}"
    elif isinstance(value, list | tuple):
        text = ", ".join(str(entry) for entry in value)
    else:
        text = str(value)
    return Text(printable(text))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _amount(num_bytes: float) -> str:
    """`1.41 GiB`."""
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if num_bytes < 1024 or unit == "TiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:.4g} {unit}"


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(name): _finite(inner) for name, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def _rendered(tables: Sequence[Table]) -> str:
    """Tables as text for the stdout at hand: in colour on a terminal, no line broken in a pipe."""
    from rich.console import Console

    on_terminal = sys.stdout.isatty()
    target = io.TextIOWrapper(io.BytesIO(), encoding=sys.stdout.encoding, errors="backslashreplace")
    console = Console(
        file=target,
        width=shutil.get_terminal_size().columns if on_terminal else _PIPE_WIDTH,
        force_terminal=on_terminal and os.environ.get("TERM", "dumb") != "dumb",
        highlight=False,
    )
    for table in tables:
        console.print(table)
    target.flush()
    lines = target.buffer.getvalue().decode(target.encoding).splitlines()
    return "\n".join(line.rstrip() for line in lines if line.strip() or on_terminal) + "\n"
