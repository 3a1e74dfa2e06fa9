"""`ldm clip search`: the pictures that are nearest to a text or to a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm_cli.data.decode import from_pillow
from ldm_cli.data.tables import is_picture
from ldm_cli.errors import DataError, InputNotFoundError, UsageError
from ldm_cli.evaluation.nearest import nearest
from ldm_cli.formats.embedding_files import EmbeddingFile, expect_new, is_embedding_file, open_embeddings
from ldm_cli.inputs import MOST_PICTURE_BYTES, read_input
from ldm_cli.pictures.grid import labelled_grid, stacked
from ldm_cli.pictures.images import save_image, to_pillow
from ldm_cli.reporting import Reporter
from ldm_cli.stages.support.clip_inputs import Clip, ClipOptions, open_picture_sets, picture_rows
from ldm_cli.stages.support.picture_sets import PictureSet, upright

_LARGEST_ON_SHEET = 224
"""Pixels of the longer side."""
_COLUMNS = 10


@dataclass(frozen=True)
class Wanted:
    """What to search for, and how much of it to show."""

    texts: Sequence[str] = ()
    """Queries by text."""
    pictures: Sequence[Path] = ()
    """Queries by picture."""
    top: int = 10
    """Results per query."""
    sheet: Path | None = None
    """A picture of all results; None: none."""
    overwrite: bool = False
    """Replace that file."""


def run(sources: Sequence[str], wanted: Wanted, options: ClipOptions, reporter: Reporter) -> dict[str, Any]:
    """Find the nearest pictures, or texts, of `sources`.

    Args:
        sources: pictures, as in `open_pictures`; or one file of `ldm clip embed` or of another program.
        options: see there; without a model, that of the embeddings is taken.

    Returns:
        `queries`, each with `text` or `picture` and `results`: `rank` from 1, `cosine`, `row` from 0, and `source` and
        `name`, or `text`, where they are known. `num_searched`; `sheet`, with one; `provenance`.

    Raises:
        UsageError: there is no query, a text is blank, or an embedding file is given with something else.
        InputNotFoundError: a query is not one picture.
        DataError: the embeddings are of another model; other errors as in `Clip` and `open_embeddings`.
    """
    if not (wanted.texts or wanted.pictures):
        raise UsageError("there is nothing to search for", remedy="give --text or --like")
    if not all(text.strip() for text in wanted.texts):
        raise UsageError("a text to search for is blank")
    for path in wanted.pictures:
        if not (path.is_file() and is_picture(path)):
            raise InputNotFoundError(f"'{path}' is not a picture", remedy="give one picture to each --like")
    expect_sheet(wanted.sheet, overwrite=wanted.overwrite)
    files = [Path(source) for source in sources if is_embedding_file(Path(source))]
    if files and len(sources) > 1:
        raise UsageError("one embedding file is searched at a time", f"{len(sources)} sources are given")
    file = open_embeddings(files[0]) if files else None
    clip = _clip_for(file, options, reporter)
    sets = [] if file is not None else open_picture_sets(sources, reporter)
    vectors, numbers = (file.vectors, []) if file is not None else clip.pictures(sets)
    queries = [{"text": text} for text in wanted.texts] + [{"picture": str(path)} for path in wanted.pictures]
    embedded = _embedded(wanted, clip, reporter)
    if embedded.shape[1] != vectors.shape[1]:
        cause = f"its vectors have {vectors.shape[1]} numbers, those of the model {embedded.shape[1]}"
        raise DataError(f"cannot search '{sources[0]}'", cause, "give the model that made it")
    cosines, places = nearest(embedded, vectors, wanted.top)
    known = file.rows(places.flatten().tolist()) if file is not None else dict(enumerate(picture_rows(sets, numbers)))
    found = [
        {**query, "results": [
            {"rank": rank, "cosine": cosine, "row": row, **known[row]}
            for rank, (cosine, row) in enumerate(zip(near, rows, strict=True), start=1)
        ]}
        for query, near, rows in zip(queries, cosines.tolist(), places.tolist(), strict=True)
    ]  # fmt: skip
    result: dict[str, Any] = {"queries": found, "num_searched": len(vectors)}
    if wanted.sheet is not None:
        save_image(wanted.sheet, sheet_of(found, sets, reporter))
        result["sheet"] = str(wanted.sheet)
    embeddings = {} if file is None else {"embeddings": {"file": str(file.file), **file.about}}
    return {**result, "provenance": {**clip.provenance(), **embeddings}}


def _clip_for(file: EmbeddingFile | None, options: ClipOptions, reporter: Reporter) -> Clip:
    """The model of the options, which must be that of the embeddings; without one, theirs."""
    made_by = file.about.get("clip", {}) if file is not None else {}
    if not (options.model or made_by):
        raise UsageError("a model is missing", remedy="give --model")
    clip = Clip(replace(options, model=options.model or str(made_by["model"])), reporter)
    if file is not None and made_by and made_by["sha256"] != clip.about["sha256"]:
        cause = f"'{clip.about['model']}' has other weights than '{made_by['model']}' had when it was written"
        raise DataError(f"cannot search '{file.file}'", cause, "embed the pictures again")
    return clip


def _embedded(wanted: Wanted, clip: Clip, reporter: Reporter) -> Tensor:
    """The queries, float32 [Q, D]."""
    parts = [clip.texts(wanted.texts)] if wanted.texts else []
    # One by one, so that a query that cannot be read is an error.
    parts += [clip.pictures(open_picture_sets([str(path)], reporter))[0] for path in wanted.pictures]
    return torch.cat(parts)


def expect_sheet(sheet: Path | None, *, overwrite: bool) -> None:
    """Raises UsageError or OutputError if the sheet, where one is wanted, cannot be written."""
    if sheet is not None:
        if sheet.suffix not in (".png", ".jpg", ".webp"):
            raise UsageError(f"cannot write '{sheet}'", "a sheet ends with .png, .jpg or .webp")
        expect_new(sheet, overwrite=overwrite)


def sheet_of(queries: Sequence[dict[str, Any]], sets: Sequence[PictureSet], reporter: Reporter) -> Tensor:
    """The results of each query side by side below it, uint8 [3, H, W]."""
    opened = {one.name: one for one in sets}
    numbers: dict[str, dict[str, int]] = {}
    rows = []
    for query in queries:
        title = str(query.get("text") or query["picture"])
        pictures, labels = [], []
        for entry in query["results"]:
            source = entry.get("source")
            if source is None:
                raise UsageError("no sheet can be made", "the embeddings do not say of which pictures they are")
            if source not in opened:
                opened[source] = open_picture_sets([source], reporter)[0]
            if source not in numbers:
                numbers[source] = {name: number for number, (name, _) in enumerate(opened[source].files)}
            if entry["name"] not in numbers[source]:
                raise DataError(f"'{source}' has no picture '{entry['name']}' any more", remedy="embed it again")
            pictures.append(_reduced(opened[source].picture(numbers[source][entry["name"]])))
            labels.append(f"{entry['cosine']:.3f} {entry['name']}")
        if "picture" in query:
            pictures.insert(0, _reduced(upright(read_input(Path(query["picture"]), MOST_PICTURE_BYTES))))
            labels.insert(0, "query")
        for start in range(0, len(pictures), _COLUMNS):
            part = labels[start : start + _COLUMNS]
            rows.append(labelled_grid(pictures[start : start + _COLUMNS], part, [""], title="" if start else title))
    return stacked(rows)


def _reduced(picture: Tensor) -> Tensor:
    """The picture with its longer side at most as long as sheets show it, uint8 [3, H, W]."""
    image = to_pillow(picture)
    image.thumbnail((_LARGEST_ON_SHEET, _LARGEST_ON_SHEET), Image.Resampling.BICUBIC)
    return from_pillow(image)[0]
