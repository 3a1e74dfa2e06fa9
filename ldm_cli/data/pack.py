"""Shards out of what people have: a folder of images with captions beside them, an imagefolder, or a CSV."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ldm_cli.data.bad_samples import BadSampleError
from ldm_cli.data.config import DataConfig
from ldm_cli.data.decode import IMAGE_EXTENSIONS, decode_rgb, upright_size
from ldm_cli.errors import DataError, InputNotFoundError, OutputError, StorageError
from ldm_cli.reporting import Reporter

_CAPTION_SUFFIXES = (".txt", ".caption")
_METADATA = "metadata.jsonl"
_LIMITS = DataConfig(shards="")


@dataclass(frozen=True)
class Source:
    """One image to pack: its file, what the source calls it, its caption if any, and what else is known."""

    path: Path
    name: str
    caption: str | None
    extra: dict[str, Any] = field(default_factory=dict)


def find_sources(source: Path, image_column: str | None = None, caption_column: str | None = None) -> Iterator[Source]:
    """The images that `source` names, in a fixed order.

    Args:
        source: a folder with a `metadata.jsonl`; a `.jsonl` or `.csv` file, whose paths start at its folder;
            or a folder of images, each with `NAME.txt` or `NAME.caption` beside it.
        image_column, caption_column: columns (or JSON fields) to use; by default `file_name` or `path`, and
            `text` or `caption`.

    Raises:
        InputNotFoundError: there is no such source.
        DataError: a line cannot be understood, or a column is missing.
    """
    if source.is_dir() and (source / _METADATA).is_file():
        source = source / _METADATA
    if source.is_dir():
        return _beside_images(source)
    if not source.is_file():
        raise InputNotFoundError(f"cannot pack '{source}'", "there is no such file or folder")
    rows = _json_rows(source) if source.suffix.lower() in (".jsonl", ".ndjson") else _csv_rows(source)
    images = (image_column,) if image_column else ("file_name", "path")
    captions = (caption_column,) if caption_column else ("text", "caption")
    return _from_table(source, rows, images, captions)


def pack(
    source: Path,
    out: Path,
    reporter: Reporter,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    shard_samples: int = 10_000,
    prefix: str = "train-",
) -> dict[str, Any]:
    """Write shards `PREFIX000000.tar`, …: image bytes as they are, txt, and a json with path and size.

    Images that are missing or cannot be decoded are left out and counted. The same source gives the same
    bytes, and `out` appears only when it is complete.

    Args:
        source, image_column, caption_column: as in `find_sources`.
        out: a folder that does not exist yet, or is empty.
        shard_samples: samples per shard.
        prefix: of the shards' names.

    Returns:
        `samples`, `without_caption`, `shards` (name to number of samples), `bad` (reason to count) and
        `bad_files` (`path: reason`).

    Raises:
        InputNotFoundError: the source does not exist, or no image in it can be used.
        DataError: the source's table is damaged.
        OutputError: `out` exists already or cannot be made.
        StorageError: writing failed.
    """
    if shard_samples < 1:
        raise ValueError(f"pack: shard_samples={shard_samples}")
    sources = find_sources(source, image_column, caption_column)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"cannot pack into '{out}'", "it exists already", "choose a new folder")
    absolute = out.absolute()
    partial = absolute.with_name(f".tmp-{absolute.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"cannot pack into '{out}'", error.strerror or str(error)) from error
    try:
        with reporter.progress(f"packing into {out}", None, unit="image") as progress:
            packing = _Packing(partial, shard_samples, prefix)
            with closing(packing):
                for number, item in enumerate(sources, start=1):
                    packing.add(item)
                    progress.update(number)
        if not packing.num_samples:
            found = ", ".join(packing.bad_files[:3]) or "it holds none"
            raise InputNotFoundError(f"there are no images to pack in '{source}'", found)
        partial.replace(out)
    except OSError as error:
        raise StorageError(f"cannot pack into '{out}'", error.strerror or str(error)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return packing.summary()


class _Packing:
    """Shards being written, and the account of them."""

    def __init__(self, folder: Path, shard_samples: int, prefix: str) -> None:
        from webdataset import TarWriter  # a slow import, needed here alone

        self.num_samples = 0
        self.bad_files: list[str] = []
        self._bad: Counter[str] = Counter()
        self._without_caption = 0
        self._shards: dict[str, int] = {}
        self._folder, self._shard_samples, self._prefix = folder, shard_samples, prefix
        self._make_writer = TarWriter
        self._writer: Any = None
        self._file: BinaryIO | None = None

    def add(self, source: Source) -> None:
        """Write a sample, or count why it is left out."""
        try:
            extension = source.path.suffix.lower().removeprefix(".")
            if extension not in IMAGE_EXTENSIONS:
                raise BadSampleError("not an image", f"suffix '.{extension}'")
            data = _read(source.path)
            width, height = upright_size(data, _LIMITS.max_pixels)
            decode_rgb(data, _LIMITS.background, _LIMITS.max_pixels, _LIMITS.image_size)
        except BadSampleError as bad:
            self._bad[bad.reason] += 1
            self.bad_files.append(f"{source.name}: {bad}")
            return
        facts = {"path": source.name, "width": width, "height": height, **source.extra}
        members: dict[str, Any] = {
            "__key__": f"{self.num_samples:09d}",
            extension: data,
            "json": json.dumps(facts, ensure_ascii=False, sort_keys=True).encode("utf-8", "backslashreplace"),
        }
        if source.caption is None:
            self._without_caption += 1
        else:
            members["txt"] = source.caption.encode("utf-8", "backslashreplace")
        self._current().write(members)
        self.num_samples += 1

    def close(self) -> None:
        """Finish the shard being written, and see it on disk."""
        if self._file is not None:
            self._writer.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        self._writer = self._file = None

    def summary(self) -> dict[str, Any]:
        """What `pack` returns."""
        return {
            "samples": self.num_samples,
            "without_caption": self._without_caption,
            "shards": self._shards,
            "bad": dict(self._bad),
            "bad_files": self.bad_files,
        }

    def _current(self) -> Any:
        """The writer of the shard that takes the next sample."""
        shard, within = divmod(self.num_samples, self._shard_samples)
        name = f"{self._prefix}{shard:06d}.tar"
        if within == 0:
            self.close()
            self._file = (self._folder / name).open("wb")
            # Fixed owner, mode and time: the same source gives the same bytes.
            self._writer = self._make_writer(self._file, encoder=False, user="ldm", group="ldm", mode=0o644, mtime=0)
        self._shards[name] = within + 1
        return self._writer


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _LIMITS.max_member_bytes:
            raise BadSampleError("member too large", f"{path.stat().st_size} bytes")
        return path.read_bytes()
    except OSError as error:
        raise BadSampleError("unreadable file", error.strerror or str(error)) from error


def _beside_images(folder: Path) -> Iterator[Source]:
    """All images below `folder` in the order of their paths, captions from the files beside them."""
    for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix()):
        if path.suffix.lower().removeprefix(".") not in IMAGE_EXTENSIONS or not path.is_file():
            continue
        texts = [path.with_suffix(suffix) for suffix in _CAPTION_SUFFIXES]
        text = next((text for text in texts if text.is_file()), None)
        caption = text.read_text("utf-8-sig", "backslashreplace").strip() if text else None
        yield Source(path, path.relative_to(folder).as_posix(), caption)


def _from_table(
    file: Path, rows: Iterator[tuple[int, dict[str, Any]]], images: tuple[str, ...], captions: tuple[str, ...]
) -> Iterator[Source]:
    """Sources out of rows: the first of `images` and of `captions` that a row has; the rest is extra."""
    for line, row in rows:
        image = next((name for name in images if name in row), None)
        caption = next((name for name in captions if name in row), None)
        if image is None or not isinstance(row[image], str) or caption is None:
            missing = " or ".join(f"'{name}'" for name in (captions if image else images))
            raise DataError(
                f"cannot read '{file}' line {line}",
                f"there is no {missing} among {', '.join(map(repr, row)) or 'nothing'}",
                "name the columns with --image-column and --caption-column",
            )
        text = row[caption]
        extra = {key: value for key, value in row.items() if key not in (image, caption)}
        yield Source(file.parent / row[image], row[image], str(text) if text is not None else None, extra)


def _json_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of each line that is not blank."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise DataError(f"cannot read '{file}' line {number}", str(error)) from error
            if not isinstance(row, dict):
                raise DataError(f"cannot read '{file}' line {number}", "it is no JSON object")
            yield number, row


def _csv_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and columns of each row; the first line names the columns."""
    with file.open(encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(
                        f"cannot read '{file}' line {reader.line_num}",
                        f"it has not the {len(reader.fieldnames or ())} columns of the first line",
                    )
                yield reader.line_num, dict(row)
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"cannot read '{file}' after line {reader.line_num}", str(error)) from error
