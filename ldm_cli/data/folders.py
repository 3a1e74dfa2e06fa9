"""The pictures of a folder: named by tables in it, with captions beside them, or sorted into folders by class."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm_cli.data.bad_samples import BadSampleError
from ldm_cli.data.captions import captions_in, decode_text, parse_json
from ldm_cli.data.masks import MaskFiles
from ldm_cli.data.pack_report import PackReport
from ldm_cli.data.source_files import SourceFiles, read_file
from ldm_cli.data.sources import Choices, Source, TableSource, captions_of_class
from ldm_cli.data.tables import CAPTION_COLUMNS, TABLE_SUFFIXES, column_among, is_picture
from ldm_cli.errors import DataError, InputNotFoundError, UnavailableError

_CAPTION_SUFFIXES = (".txt", ".caption")
_KOHYA = re.compile(r"([1-9]\d{0,2})_(.*\S.*)")
_NUMBERED = re.compile(r"\d+_")
# Names of folders that do not describe the pictures in them.
_NO_CLASSES = frozenset(
    (
        *("train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "data", "dataset"),
        *("image", "images", "img", "imgs", "photo", "photos", "picture", "pictures"),
    )
)


def find_pictures(source: Path, choices: Choices, report: PackReport) -> Iterator[Source]:
    """The pictures that `source` names, in a fixed order.

    Args:
        source: a table of pictures (CSV, TSV, JSON, JSON Lines, Parquet), whose paths start at its folder; or a folder.
            In a folder, every table that has a column of pictures is read. A picture that no table names has its
            caption in `NAME.txt`, `NAME.caption` or `NAME.json` beside it. Where no picture has one, the name of its
            folder is its class; folders `10_NAME` are those of kohya's scripts. Masks of pictures are no pictures.
        report: records pictures that are left out, files that are not read, and remarks.

    Raises:
        InputNotFoundError: there is no such source.
        DataError: a row cannot be understood, or a column is missing.
        UnavailableError: Parquet is named, and pyarrow is not installed.
    """
    if source.is_dir():
        return _Folder(source, choices, report).sources()
    if not source.is_file():
        raise InputNotFoundError(f"cannot pack '{source}'", "there is no such file or folder")
    if source.suffix.lower() not in (*TABLE_SUFFIXES, ".txt", ""):
        kind, remedy = f"a {source.suffix} file is no table of pictures", "name a folder, a CSV, JSON or Parquet file"
        if source.suffix.lower() == ".tar":
            kind, remedy = "a tar is a shard already", "name it as data.shards, or unpack it"
        raise DataError(f"cannot pack '{source}'", kind, remedy)
    table = TableSource(source, choices, report, SourceFiles(source.parent))
    report.classes = tuple(sorted(table.class_names()))
    return iter(table)


class _Folder:
    """A folder and all below it."""

    def __init__(self, folder: Path, choices: Choices, report: PackReport) -> None:
        self._folder, self._choices, self._report = folder, choices, report
        self._files = SourceFiles(folder, report.pass_over)
        self._name = self._files.name
        pictures, masks = [path for path in self._files.paths if is_picture(path)], MaskFiles()
        self._others = dict.fromkeys(path for path in self._files.paths if not is_picture(path))
        masks_of_others = {masks.of(picture) for picture in pictures}
        self._pictures = [path for path in pictures if path not in masks_of_others]
        self._refused: dict[Path, DataError | UnavailableError] = {}
        self._beside: dict[str, list[Path]] = {}
        for path in self._others:
            if path.suffix.lower() in (*_CAPTION_SUFFIXES, ".json"):
                stem = self._name(path.with_suffix(""))
                for name in {stem, stem.lower()}:
                    self._beside.setdefault(name, []).append(path)

    def sources(self) -> Iterator[Source]:
        """The pictures of tables, then the others."""
        tables = self._tables()
        self._report.classes = tuple(sorted(set().union(*(table.class_names() for table in tables))))
        named: set[str] = set()
        for table in tables:
            for source in table:
                if isinstance(source.picture, Path):
                    if (real := os.path.realpath(source.picture)) in named:
                        self._report.remark("picture named more than once")
                    named.add(real)
                yield source
        loose: list[Path] = []
        without: list[Path] = []
        folders = {table.table.parent for table in tables}
        for path in self._pictures:
            if not named or os.path.realpath(path) not in named:
                is_beside_table = not folders.isdisjoint(path.parents)
                (without if is_beside_table and not self._beside_picture(path) else loose).append(path)
        yield from self._loose(loose)
        for path in without:
            self._report.pass_over("picture that no table names", self._name(path))
        for path in self._others:
            suffix, name = path.suffix.lower(), self._name(path)
            if path in self._refused and suffix in (".csv", ".tsv"):  # others need not be meant as tables
                name += f": {self._refused[path].cause}"
                self._report.tables_not_read.append("; ".join(filter(None, (name, self._refused[path].remedy))))
            self._report.pass_over(suffix or "file without suffix", name)

    def _tables(self) -> list[TableSource]:
        """The files that are tables of pictures; a `metadata.*` must be one."""
        tables: list[TableSource] = []
        beside = {path for picture in self._pictures for path in self._beside_picture(picture)}
        suffixes = (*TABLE_SUFFIXES, ".txt")
        for path in [path for path in self._others if path.suffix.lower() in suffixes and path not in beside]:
            try:
                tables.append(TableSource(path, self._choices, self._report, self._files))
                del self._others[path]
            except (DataError, UnavailableError) as error:
                if path.suffix.lower() == ".txt":
                    continue
                if path.stem.lower() == "metadata":
                    raise
                self._refused[path] = error
        named = self._choices.image_column or self._choices.caption_column
        if self._refused and not tables and (named or not self._pictures):
            raise next(iter(self._refused.values()))
        if named and not tables and not any(path.suffix.lower() == ".json" for path in self._others):
            raise DataError(f"cannot pack '{self._folder}'", f"no table in it has a column '{named}'", "leave it out")
        return tables

    def _beside_picture(self, picture: Path) -> list[Path]:
        """The text and JSON files of a picture: `IMG_1.txt` or `IMG_1.JPG.txt`, else with other capitals."""
        names = (self._name(picture.with_suffix("")), self._name(picture))
        return [path for name in names for path in self._beside.get(name) or self._beside.get(name.lower(), [])]

    def _companions(self, picture: Path) -> dict[str, Path]:
        """The files beside a picture by suffix.

        Raises:
            BadSampleError: "ambiguous caption": there are several of one suffix.
        """
        found: dict[str, Path] = {}
        for path in self._beside_picture(picture):
            if (other := found.setdefault(path.suffix.lower(), path)) != path:
                raise BadSampleError("ambiguous caption", f"{other.name} or {path.name}")
        return found

    def _loose(self, pictures: list[Path]) -> Iterator[Source]:
        """Pictures that no table names."""
        sources, has_captions = [], False
        for path in pictures:
            try:
                source = self._with_companions(path)
            except (BadSampleError, ValueError) as error:
                bad = error if isinstance(error, BadSampleError) else BadSampleError("caption is no text", str(error))
                self._report.leave_out(self._name(path), bad)
                continue
            has_captions = has_captions or bool(source.captions)
            sources.append((path, source))
        parents = {path.parent.name for path, _ in sources if path.parent != self._folder}
        depths = {len(path.parents) for path, _ in sources}
        is_kohya = bool(parents) and all(_KOHYA.fullmatch(name) for name in parents)
        are_classes = len(depths) == 1 and len(parents) > 1 and not _NO_CLASSES & {name.lower() for name in parents}
        are_classes = are_classes and not (is_kohya or has_captions or self._report.classes)
        # A folder `10_NAME` beside one without a number is no class: its number counts repeats.
        are_classes = are_classes and len({bool(_NUMBERED.match(name)) for name in parents}) == 1
        if are_classes:
            self._report.classes = tuple(sorted(parents))
        for path, source in sources:
            name = path.parent.name
            if are_classes:
                captions = captions_of_class(name, self._choices.caption_template, self._report)
                source = replace(source, captions=captions, label=self._report.classes.index(name))
            elif is_kohya and path.parent != self._folder:
                source = self._repeated(name, source)
            yield source

    def _with_companions(self, picture: Path) -> Source:
        """A picture with the captions and facts of the files beside it."""
        companions = self._companions(picture)
        facts: dict[str, Any] = {}
        captions: tuple[str, ...] = ()
        if ".json" in companions:
            try:
                facts = parse_json(read_file(companions[".json"]))
                self._others.pop(companions[".json"], None)
            except BadSampleError:
                facts = {}  # the file stays among those that are not read
        text = next((companions[suffix] for suffix in _CAPTION_SUFFIXES if suffix in companions), None)
        if text is not None:
            self._others.pop(text, None)
            decoded = decode_text(read_file(text))
            for remark in decoded.remarks:
                self._report.remark(remark)
            captions = captions_in(decoded.text)
        elif column := column_among(list(facts), (self._choices.caption_column or "", *CAPTION_COLUMNS)):
            captions = tuple(text for text in captions_in(facts[column]) if text != picture.name)
            facts = {name: value for name, value in facts.items() if name != column}
        return Source(self._name(picture), picture, captions, extra=facts)

    def _repeated(self, folder: str, source: Source) -> Source:
        """A picture of a folder `10_NAME`, ten times; without a caption it has NAME, as in kohya's scripts."""
        times, _, name = folder.partition("_")
        self._report.repeats[folder] = int(times)
        self._report.from_class_names += not source.captions
        return replace(source, captions=source.captions or (name.strip(),), repeats=int(times))
