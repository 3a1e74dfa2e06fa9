"""The pictures of a table, with their captions, classes and other cells."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm_cli.data.bad_samples import BadSampleError
from ldm_cli.data.captions import NO_TEXT, captions_in
from ldm_cli.data.pack_report import PackReport
from ldm_cli.data.source_files import SourceFiles
from ldm_cli.data.tables import (
    CAPTION_COLUMNS,
    CLASS_COLUMNS,
    Row,
    column_among,
    columns_of,
    image_column_among,
    place_in,
    rows_of,
)
from ldm_cli.errors import DataError

_MOST_WORDS_OF_CLASS = 4
_NUMBER = re.compile(r"([+-]?\d{1,18})(\.0*)?")
# Years and numbers, answers, WordNet's ids and camera folders say nothing about a picture.
_NO_NAME = re.compile(r"[\W\d_]*|(?i:true|false|yes|no)|n\d{8}|\d{3}[A-Z0-9_]{5}")


@dataclass(frozen=True)
class Source:
    """One picture to pack.

    Attributes:
        name: its path or place in the source.
        picture: its file, or the bytes of one.
        captions: none, one or several.
        label: number of its class, if it has one.
        repeats: how many samples it becomes.
        extra: all other facts about it, as JSON data.
    """

    name: str
    picture: Path | bytes
    captions: tuple[str, ...]
    label: int | None = None
    repeats: int = 1
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Choices:
    """The user's settings for a source.

    Attributes:
        image_column, caption_column: names of columns; None: the usual ones; an empty `caption_column`: no captions.
        caption_template: caption of a picture that has a class, where the source has no captions; the name of the class
            replaces `{}`.
    """

    image_column: str | None = None
    caption_column: str | None = None
    caption_template: str = "a photo of a {}"


class TableSource:
    """A table of pictures.

    Args:
        report: records pictures that are left out, and remarks.
        files: where to look for a picture that is not at its path from the table's folder.

    Raises:
        DataError: the table is damaged, or its columns are not the expected ones.
        UnavailableError: it is Parquet, and pyarrow is not installed.
    """

    def __init__(self, table: Path, choices: Choices, report: PackReport, files: SourceFiles) -> None:
        self.table, self._files = table, files
        self._choices, self._report = choices, report
        columns = columns_of(table)
        self._image = self._given(choices.image_column, columns) or image_column_among(table, columns) or ""
        self._caption = self._given(choices.caption_column, columns)
        if choices.caption_column is None:
            self._caption = column_among(columns, CAPTION_COLUMNS)
        chosen = (self._image, self._caption)
        self._classes = [c for c in columns if column_among([c], CLASS_COLUMNS) and c not in chosen]
        has_text = self._caption is not None or bool(self._classes) or choices.caption_column == ""
        if not self._image or not has_text:
            missing = "captions or classes" if self._image else "pictures"
            raise DataError(
                f"cannot pack '{table}'",
                f"no column of {missing} is known among {', '.join(map(repr, columns)) or 'none'}",
                "name it with --image-column or --caption-column, or say --caption-column '' for no captions",
            )

    def _given(self, name: str | None, columns: list[str]) -> str | None:
        """A column that the user names."""
        if name and name not in columns:
            found = ", ".join(map(repr, columns)) or "none"
            raise DataError(f"cannot pack '{self.table}'", f"there is no column '{name}' among {found}")
        return name or None

    def class_names(self) -> set[str]:
        """The names of the classes that have no number."""
        rows = rows_of(self.table, only=self._classes) if self._classes else ()
        classes = [self._class(row) for _, row in rows]
        return {name for number, name in classes if number is None and name is not None}

    def __iter__(self) -> Iterator[Source]:
        """One source for each picture; rows of one picture that follow one another are its captions. A class without a
        number has its place among the report's classes.

        Raises:
            DataError: a row cannot be understood; the message names it.
        """
        rows = rows_of(self.table, self._report.remark)
        for name, group in itertools.groupby(rows, key=self._name):
            try:
                source = self._source(name, list(group))
            except BadSampleError as error:
                self._report.leave_out(name, error)
                continue
            yield source

    def _name(self, row: Row) -> str:
        """The path in a row, or the place of a row that holds the picture itself."""
        where, cells = row
        path = cells.get(self._image)
        return path if isinstance(path, str) and path else f"{self.table.name} {where}"

    def _source(self, name: str, rows: list[Row]) -> Source:
        where, first = rows[0]
        cell = first.get(self._image)
        picture = self._picture(where, cell)
        if isinstance(cell, dict):
            name = cell.get("path") or name
        captions: list[str] = []
        for place, row in rows:
            column = self._caption_column(row)
            try:
                captions += captions_in(row[column]) if column else ()
            except ValueError as error:
                raise DataError(f"cannot read {place_in(self.table, place)}: '{column}'", str(error)) from error
        classes = (self._class(row) for _, row in rows)
        number, class_name = next((found for found in classes if found != (None, None)), (None, None))
        if number is None and class_name is not None:
            number = self._report.classes.index(class_name)
        if not self._caption and self._choices.caption_column is None and class_name:
            if len(class_name.split()) > _MOST_WORDS_OF_CLASS:
                cause = f"'{class_name}' is too long for the name of a class"
                raise DataError(f"cannot read {place_in(self.table, where)}", cause, "add --caption-column NAME")
            captions += captions_of_class(class_name, self._choices.caption_template, self._report)
        return Source(name, picture, tuple(captions), number, extra=self._facts([row for _, row in rows]))

    def _facts(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The other cells of a picture's rows by column: one value if all rows have the same, else a list."""
        own = [{c: v for c, v in row.items() if c not in (self._image, self._caption_column(row))} for row in rows]
        cells = {column: [row.get(column) for row in own] for row in own for column in row}
        return {c: values if any(v != values[0] for v in values[1:]) else values[0] for c, values in cells.items()}

    def _caption_column(self, row: dict[str, Any]) -> str | None:
        """The column of captions; JSON rows may each have another."""
        if self._caption in row or self._choices.caption_column is not None:
            return self._caption if self._caption in row else None
        return column_among(list(row), CAPTION_COLUMNS)

    def _class(self, row: dict[str, Any]) -> tuple[int | None, str | None]:
        """Number and name of a row's class; None for one that the row has not."""
        number, name = None, None
        for column in self._classes:
            cell = row.get(column)
            if found := _NUMBER.fullmatch(str(cell)):
                number = int(found[1]) if number is None and int(found[1]) >= 0 else number
            elif name is None and isinstance(cell, str) and cell.strip() not in NO_TEXT:
                name = cell
        return number, name

    def _picture(self, where: str, cell: Any) -> Path | bytes:
        """The picture in a cell: a path, bytes, or a struct of both as in Hugging Face `datasets`."""
        if isinstance(cell, dict) and {"bytes", "path"} & cell.keys():
            cell = cell.get("bytes") or cell.get("path")
        if isinstance(cell, bytes):
            return cell
        if not cell:
            raise BadSampleError("no picture named", f"in '{self._image}'")
        if not isinstance(cell, str):
            kind = type(cell).__name__
            raise DataError(
                f"cannot read {place_in(self.table, where)}: '{self._image}'", f"expected a path, found {kind}"
            )
        if "://" in cell[:12]:
            raise BadSampleError("remote picture", "download it first, as img2dataset does")
        return self._files.find(cell, self.table.parent)


def captions_of_class(name: str, template: str, report: PackReport) -> tuple[str, ...]:
    """`golden_retriever` in the template, if the name of the class is one."""
    if _NO_NAME.fullmatch(name):
        return ()
    report.from_class_names += 1
    return (template.replace("{}", name.replace("_", " ").strip()),)
