"""Pack pictures and captions into shards: from a folder, or from a table that names pictures."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm_cli.data.bad_samples import BadSampleError
from ldm_cli.data.config import DataConfig
from ldm_cli.data.decode import decode_rgb, image_header
from ldm_cli.data.folders import find_pictures
from ldm_cli.data.masks import MASK_MEMBER, MaskFiles, expect_size
from ldm_cli.data.pack_report import PackReport
from ldm_cli.data.shard_writer import ShardSeries
from ldm_cli.data.source_files import read_file
from ldm_cli.data.sources import Choices, Source
from ldm_cli.errors import InputNotFoundError, OutputError, StorageError
from ldm_cli.reporting import Progress, Reporter
from ldm_cli.storage import TEMPORARY_PREFIX

_LIMITS = DataConfig(shards="*.tar")
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}  # of formats that are not their own


def pack(
    source: Path,
    out: Path,
    reporter: Reporter,
    *,
    choices: Choices = Choices(),
    shard_samples: int = 10_000,
    prefix: str = "train-",
    val_fraction: float = 0.0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write shards `PREFIX000000.tar`, … of image bytes as they are, txt, cls, mask.png (where there are) and json.

    The json holds all other facts, path, width and height, the name of the class as `class`, and `captions`, the list
    of all captions; txt is the first of them. Pictures that are missing or cannot be decoded are left out, other files
    are counted. The same source gives the same bytes. `out`, or the shards in it if it exists, appear when all of them
    are written.

    Args:
        source, choices: as in `find_pictures`.
        out: a folder, which may hold shards of other prefixes.
        shard_samples, prefix: samples per shard, and of its name.
        val_fraction: share of the pictures that become held-out shards `val-…`, in [0, 1). A hash of its path decides
            for each picture, so that further ones change nothing for it.
        overwrite: replace shards of these prefixes.

    Returns:
        `samples`, `val_samples`, `without_caption`, `several_captions`, `with_mask`, `shards` (name to number of
        samples) and the `PackReport.summary`.

    Raises:
        InputNotFoundError: the source does not exist, or no picture in it can be used.
        DataError: the source's table is damaged, or not understood.
        UnavailableError: it is Parquet, and pyarrow is not installed.
        OutputError: `out` has such shards and `overwrite` is False, or it cannot be made.
        StorageError: writing failed.
    """
    if shard_samples < 1 or not 0 <= val_fraction < 1:
        raise ValueError(f"pack: {shard_samples=}, {val_fraction=}")
    packing = _Packing(report := PackReport(), val_fraction)
    prefixes = [prefix, *([_val_prefix(prefix)] if val_fraction else [])]
    with _appearing_whole(out, prefixes, overwrite) as folder:
        series = [ShardSeries(folder, name, shard_samples) for name in prefixes]
        with ExitStack() as stack, reporter.progress("packing", None, unit="image") as progress:
            own = [stack.enter_context(one) for one in series]
            for is_held_out, members in packing.samples(find_pictures(source, choices, report), progress):
                own[int(is_held_out)].add(members)
        if not any(one.num_samples for one in series):
            remedy = "tars are shards already: name them as data.shards" if report.not_read[".tar"] else ""
            raise InputNotFoundError(f"there are no pictures to pack in '{source}'", report.what_was_seen(), remedy)
    packing.warn(reporter, counts := [one.num_samples for one in series])
    return {
        "samples": counts[0],
        "val_samples": sum(counts[1:]),
        "without_caption": packing.num_without,
        "several_captions": packing.num_several,
        "with_mask": packing.num_masks,
        "shards": {name: count for one in series for name, count in one.shards().items()},
        **report.summary(),
    }


def _val_prefix(prefix: str) -> str:
    """The prefix of held-out shards: `val-` beside `train-`, `val-cats-` beside `cats-`."""
    return f"val-{prefix.removeprefix('train-')}"


def _share(name: str) -> float:
    """A number in [0, 1) that depends on nothing but the text."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64


@contextmanager
def _appearing_whole(out: Path, prefixes: Sequence[str], overwrite: bool) -> Iterator[Path]:
    """A folder to fill. If nothing is raised, it becomes `out`, or its files move into `out` where that exists.

    An existing folder is not replaced, because it may be the working directory, a link or a mount point.

    Raises:
        OutputError: `out` has shards of these prefixes and `overwrite` is False, or it cannot be made.
        StorageError: writing failed.
    """
    target = Path(os.path.realpath(out))
    exists = target.is_dir()
    partial = target / f"{TEMPORARY_PREFIX}pack" if exists else target.with_name(f"{TEMPORARY_PREFIX}{target.name}")
    try:
        names = "|".join(map(re.escape, prefixes))
        old = (
            {path.name for path in target.iterdir() if re.fullmatch(rf"({names})\d{{6}}\.tar", path.name)}
            if exists
            else set()
        )
        if not exists and os.path.lexists(target):
            raise OutputError(f"cannot pack into '{out}'", "it exists already, and is no folder", "choose a folder")
        if old and not overwrite:
            remedy = "add --overwrite, or choose another --prefix or folder"
            raise OutputError(f"cannot pack into '{out}'", f"{min(old)} exists already", remedy)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"cannot pack into '{out}'", error.strerror or str(error)) from error
    try:
        yield partial
        if not exists:
            partial.replace(target)
        for file in list(partial.iterdir()) if exists else ():
            old.discard(file.name)
            file.replace(target / file.name)
        for name in old:
            (target / name).unlink()
    except StorageError as error:
        raise StorageError(f"cannot pack into '{out}'", error.cause, error.remedy) from error
    except OSError as error:
        raise StorageError(f"cannot pack into '{out}'", error.strerror or str(error)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class _Packing:
    """Samples of sources, and their counts."""

    def __init__(self, report: PackReport, val_fraction: float) -> None:
        self.num_several = self.num_without = self.num_masks = 0
        self._report, self._masks, self._val_fraction = report, MaskFiles(), val_fraction

    def warn(self, reporter: Reporter, counts: Sequence[int]) -> None:
        """Warn of captions that are not read or not used, and of a split without one side.

        Args:
            counts: samples of each side.
        """
        if self.num_without and self._report.tables_not_read:
            reporter.warn(f"samples without a caption: {self.num_without}; not read: {self._report.tables_not_read[0]}")
        if self.num_several:
            reporter.warn(
                f"samples with several captions: {self.num_several}; txt holds the first of them: train with "
                "data.caption=json:captions to choose one of them each time"
            )
        if len(counts) > 1 and 0 in counts:
            reporter.warn(f"{counts[0]} samples for training and {counts[1]} held out: change --val-fraction")

    def samples(self, sources: Iterable[Source], progress: Progress) -> Iterator[tuple[bool, dict[str, bytes]]]:
        """The members of every sample, and whether it is held out, which takes one sample of a picture alone; a picture
        that cannot be used is left out and counted."""
        for number, picture in enumerate(sources, start=1):
            is_held_out = _share(picture.name) < self._val_fraction
            source = replace(picture, repeats=1) if is_held_out else picture
            try:
                members = self._members(source)
            except BadSampleError as bad:
                self._report.leave_out(source.name, bad)
            else:
                self.num_without += source.repeats * (not source.captions)
                self.num_several += source.repeats * (len(source.captions) > 1)
                self.num_masks += source.repeats * (MASK_MEMBER in members)
                for _ in range(source.repeats):
                    yield is_held_out, members
            progress.update(number)

    def _members(self, source: Source) -> dict[str, bytes]:
        data = source.picture if isinstance(source.picture, bytes) else read_file(source.picture)
        form, width, height = image_header(data, _LIMITS.max_pixels)
        for remark in decode_rgb(data, _LIMITS.background, _LIMITS.max_pixels, _LIMITS.image_size).remarks:
            self._report.remark(remark)
        facts = {**source.extra, "path": source.name, "width": width, "height": height}
        members = {_EXTENSIONS.get(form, form.lower()): data}
        if isinstance(source.picture, Path) and (mask := self._masks.of(source.picture)) is not None:
            members[MASK_MEMBER] = read_file(mask)
            size = decode_rgb(members[MASK_MEMBER], (0, 0, 0), _LIMITS.max_pixels).size
            expect_size(size, (height, width))
        if source.captions:
            facts["captions"] = source.captions
            members["txt"] = source.captions[0].encode()
        if source.label is not None:
            members["cls"] = str(source.label).encode()
            if source.label < len(self._report.classes):
                facts.setdefault("class", self._report.classes[source.label])
        text = json.dumps(_json_value(facts), ensure_ascii=False, sort_keys=True, allow_nan=False)
        members["json"] = text.encode("utf-8", "backslashreplace")
        return members


def _json_value(value: Any) -> Any:
    """JSON data: NaN and infinities become null, bytes their number, and what JSON does not know becomes text."""
    if isinstance(value, Mapping):
        return {str(name): _json_value(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(inner) for inner in value]
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)
