"""Rows of the tables that name pictures: CSV and its relatives, JSON, JSON Lines and Parquet."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ldm_cli.data.bad_samples import BadSampleError
from ldm_cli.data.captions import decode_text, encoding_of
from ldm_cli.data.decode import IMAGE_EXTENSIONS
from ldm_cli.errors import DataError, UnavailableError
from ldm_cli.inputs import open_input

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
"""Of the files that are tables; a `.txt` that is named by itself is read as CSV."""

IMAGE_COLUMNS = (
    *("file_name", "path", "file_path", "image", "image_path", "image_file", "image_name", "image_file_name"),
    *("img", "img_path", "img_file", "img_name", "file", "local_path", "picture", "photo", "jpg", "png", "webp"),
    *("image_id", "img_id"),
)
CAPTION_COLUMNS = (
    *("text", "caption", "captions", "texts", "prompt", "title", "description", "sentence", "sentences", "comment"),
    *("image_caption", "caption_text", "alt_text", "alt", "txt"),
)
CLASS_COLUMNS = ("class", "class_name", "label", "label_name", "cls", "category", "class_id", "label_id", "target")
"""Column names in the order of preference; capitals, blanks and punctuation do not count."""

Row = tuple[str, dict[str, Any]]
"""Where a row stands (`line 3`), and its cells by column."""

_MOST_BYTES_OF_CELL = 2**28
_PICTURE_SUFFIXES = frozenset(f".{extension}" for extension in (*IMAGE_EXTENSIONS, "jfif", "jpe", "apng", "dib"))


def is_picture(path: Path) -> bool:
    """Whether a file's name says that it is a picture of a kind that can be read."""
    return path.suffix.lower() in _PICTURE_SUFFIXES


def columns_of(table: Path) -> list[str]:
    """The names of all columns, in the order in which they occur.

    Raises:
        DataError: the table is damaged.
        UnavailableError: it is Parquet, and pyarrow is not installed.
    """
    if table.suffix.lower() == ".parquet":
        with _opened_parquet(table) as file:
            names = ["class_name"] if _class_names(file) else []
            return list(dict.fromkeys((*names, *file.schema_arrow.names)))
    if table.suffix.lower() in (".jsonl", ".ndjson", ".json"):
        return list(dict.fromkeys(name for _, row in rows_of(table) for name in row))
    return _csv_header(table, _csv_records(table, lambda remark: None))


def rows_of(
    table: Path, remark: Callable[[str], None] = lambda remark: None, only: Collection[str] | None = None
) -> Iterator[Row]:
    """The rows of a table.

    Args:
        table: the file; its suffix tells the kind.
        remark: receives a remark for each line that is not UTF-8, and one for a file in UTF-16.
        only: columns to read of a Parquet file; None: all. Other tables are read whole.

    Raises:
        DataError: the table is damaged; the message names the row.
        UnavailableError: it is Parquet, and pyarrow is not installed.
    """
    suffix = table.suffix.lower()
    if suffix == ".parquet":
        return _parquet_rows(table, only)
    if suffix in (".jsonl", ".ndjson"):
        return _json_lines(table, text_lines(table, remark))
    return _json_rows(table, remark) if suffix == ".json" else _csv_rows(table, remark)


def column_among(columns: Sequence[str], wanted: Iterable[str]) -> str | None:
    """The first of the `wanted` names that `columns` has, as it is spelled there; None if it has none."""
    spelled = {_plain(column): column for column in reversed(columns)} | {column: column for column in columns}
    return next((spelled[key] for name in wanted for key in (name, _plain(name)) if key in spelled), None)


def image_column_among(table: Path, columns: Sequence[str]) -> str | None:
    """The column of pictures: one of `IMAGE_COLUMNS`, else the only one called `…_file_name`.

    Raises:
        DataError: there are several `…_file_name`.
    """
    found = column_among(columns, IMAGE_COLUMNS)
    others = [column for column in columns if _plain(column).endswith("filename")]
    if found is None and len(others) > 1:
        names = ", ".join(map(repr, others))
        raise DataError(f"cannot choose a picture of '{table}'", f"{names} each name one", "add --image-column NAME")
    return found or (others[0] if others else None)


def _plain(column: str) -> str:
    return re.sub(r"[\W_]", "", column.casefold())


def place_in(table: Path, where: str) -> str:
    """`captions.csv:3` for a line, as compilers write it; else `'captions.json' entry 3`."""
    line = where.removeprefix("line ")
    return f"'{table}' {where}" if line == where else f"{table}:{line}"


def text_lines(file: Path, remark: Callable[[str], None]) -> Iterator[str]:
    """The lines of a text with their ends, decoded by the mark at its beginning, or each by `decode_text`.

    Raises:
        DataError: it cannot be read, or a line is in no known encoding.
    """
    try:
        with open_input(file) as data:
            start = data.peek(4096)
            encoding = encoding_of(start)
            if encoding is not None and not encoding.startswith("utf-8"):
                remark(f"{encoding[:6].upper()} text")
                yield from io.TextIOWrapper(data, encoding, newline="")
                return
            has_old_ends = b"\r" in start and b"\n" not in start
            for number, line in enumerate(data.read().splitlines(keepends=True) if has_old_ends else data, start=1):
                try:
                    found = decode_text(line)
                except BadSampleError as error:
                    raise DataError(f"cannot read {file}:{number}", error.detail) from error
                for what in found.remarks:
                    remark(what)
                yield found.text.removeprefix("\ufeff")
    except OSError as error:
        raise DataError(f"cannot read '{file}'", error.strerror or str(error)) from error
    except UnicodeError as error:
        raise DataError(f"cannot read '{file}'", str(error)) from error


def _csv_records(table: Path, remark: Callable[[str], None]) -> Iterator[tuple[str, list[str]]]:
    """Place and cells of each record that is not blank, the header first. The header shows the delimiter."""
    csv.field_size_limit(_MOST_BYTES_OF_CELL)
    lines = text_lines(table, remark)
    header = next(lines, "")
    first, delimiter = 1, "\t" if table.suffix.lower() == ".tsv" else max(",;\t|", key=header.count)
    if header.lower().startswith("sep="):  # Excel's first line
        first, delimiter, header = 2, header[4:5], next(lines, "")
    reader = csv.reader(itertools.chain((header,), lines), delimiter=delimiter, strict=True, skipinitialspace=True)
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield f"line {reader.line_num + first - 1}", cells
    except csv.Error as error:
        raise DataError(f"cannot read {table}:{reader.line_num + first - 1}", str(error)) from error


def _csv_header(table: Path, records: Iterator[tuple[str, list[str]]]) -> list[str]:
    """The names in the first record; those of columns without one are empty."""
    columns = [cell.strip() for cell in next(records, ("", []))[1]]
    if doubled := {column for column in columns if column and columns.count(column) > 1}:
        raise DataError(f"cannot read '{table}'", f"two columns are called {', '.join(map(repr, sorted(doubled)))}")
    return columns


def _csv_rows(table: Path, remark: Callable[[str], None]) -> Iterator[Row]:
    """The first record names the columns."""
    records = _csv_records(table, remark)
    columns = _csv_header(table, records)
    for where, cells in records:
        if len(cells) != len(columns):
            cause = f"it has not the {len(columns)} columns of the first line but {len(cells)}"
            raise DataError(
                f"cannot read {place_in(table, where)}", cause, "put cells that contain the delimiter in quotes"
            )
        yield where, {column: cell.strip() for column, cell in zip(columns, cells, strict=True) if column}


def _json_lines(table: Path, lines: Iterable[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                cause = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                raise DataError(f"cannot read {table}:{number}", cause) from error
            yield f"line {number}", _object(table, f"line {number}", row)


def _json_rows(table: Path, remark: Callable[[str], None]) -> Iterator[Row]:
    """A list of objects, a mapping from pictures to captions or objects, COCO's captions, JSON Lines, or what
    `ldm sample` writes beside its pictures."""
    lines = list(text_lines(table, remark))
    try:
        value = json.loads("".join(lines))
    except (ValueError, RecursionError):
        yield from _json_lines(table, lines)
        return
    if isinstance(value, dict) and {"images", "annotations"} <= value.keys():
        value = _coco_rows(table, value)
    elif isinstance(value, dict) and {"images", "job"} <= value.keys():
        value = value["images"]
    elif isinstance(value, dict) and _is_mapping_of_pictures(value):
        value = [
            {"file_name": name, **entry} if isinstance(entry, dict) else {"file_name": name, "text": entry}
            for name, entry in value.items()
        ]
    if not isinstance(value, list):
        raise DataError(f"cannot read '{table}'", "expected a list of objects, or a mapping from pictures to captions")
    for number, entry in enumerate(value, start=1):
        yield f"entry {number}", _object(table, f"entry {number}", entry)


def _coco_rows(table: Path, value: dict[str, Any]) -> list[dict[str, Any]]:
    """COCO's images with all their captions."""
    for name, key in (("images", "id"), ("annotations", "image_id")):
        entries = value[name] if isinstance(value[name], list) else [None]
        if not all(isinstance(entry, dict) and not isinstance(entry.get(key), list | dict) for entry in entries):
            raise DataError(f"cannot read '{table}'", f"'{name}' is no list of objects with a plain '{key}'")
    captions: dict[Any, list[Any]] = {}
    for annotation in value["annotations"]:
        captions.setdefault(annotation.get("image_id"), []).append(annotation.get("caption"))
    return [{**image, "captions": captions.get(image.get("id"), [])} for image in value["images"]]


def _is_mapping_of_pictures(value: dict[str, Any]) -> bool:
    """Whether the keys are pictures, by their suffixes or by what each has: `{"a.jpg": "a dog"}`."""
    texts = [entry for entry in value.values() if isinstance(entry, str | list | dict)]
    described = [entry for entry in texts if isinstance(entry, dict) and column_among(list(entry), CAPTION_COLUMNS)]
    return len(texts) == len(value) and (len(described) == len(value) or any(is_picture(Path(name)) for name in value))


def _object(table: Path, where: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"cannot read {place_in(table, where)}", "it is no JSON object")
    return row


@contextmanager
def _opened_parquet(table: Path) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile`, whose errors within the context tell that the table is damaged."""
    try:
        from pyarrow import ArrowException  # type: ignore[import-untyped]
        from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]
    except ImportError as error:
        remedy = "install it with pip install 'ldm-cli[parquet]'"
        raise UnavailableError(f"cannot read '{table}'", "pyarrow is not installed", remedy) from error
    try:
        with open_input(table) as stream, ParquetFile(stream) as file:
            yield file
    except (ArrowException, OSError) as error:
        raise DataError(f"cannot read '{table}'", str(error)) from error


def _parquet_rows(table: Path, only: Collection[str] | None) -> Iterator[Row]:
    """The rows, with `class_name` where the file has names of classes."""
    with _opened_parquet(table) as file:
        classes = _class_names(file)
        wanted = None if only is None else [c for c in file.schema_arrow.names if c in only or c in classes]
        batches = file.iter_batches(batch_size=16, columns=wanted)
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), start=1):
            for column, names in classes.items():
                if isinstance(row.get(column), int) and 0 <= row[column] < len(names):
                    row.setdefault("class_name", names[row[column]])
            yield f"row {number}", row


def _class_names(file: Any) -> dict[str, list[str]]:
    """The names of classes that Hugging Face `datasets` keeps in a Parquet file, by column of their numbers."""
    with suppress(ValueError, AttributeError, TypeError):  # other writers may use its key for other things
        facts = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
        features: dict[str, Any] = facts.get("info", {}).get("features", {})
        return {name: list(entry["names"]) for name, entry in features.items() if "names" in entry}
    return {}
