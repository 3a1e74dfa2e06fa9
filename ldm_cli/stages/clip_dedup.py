"""`ldm clip dedup`: near-duplicates by the embeddings of a CLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ldm_cli.data.duplicates import report_duplicates
from ldm_cli.data.near_pairs import near_pairs
from ldm_cli.errors import DataError
from ldm_cli.formats.embedding_files import EmbeddingFile, expect_new, open_embeddings
from ldm_cli.reporting import Reporter


def run(
    embeddings: Path, against: Path | None, threshold: float, out: Path, reporter: Reporter, *, overwrite: bool = False
) -> dict[str, Any]:
    """Compare the pictures of a file of `ldm clip embed` with one another, and with those of another one.

    Args:
        embeddings: of the set in which samples may be left out.
        against: embeddings of another set, by the same model.
        threshold: least cosine of duplicates.
        out: file to write, for `data.quarantine`.

    Returns:
        As `report_duplicates`, and `clip`, the model of the embeddings.

    Raises:
        DataError: the files are of different models, or do not name their pictures.
        OutputError, StorageError: `out` exists or cannot be written; other errors as in `open_embeddings`.
    """
    expect_new(out, overwrite=overwrite)
    files = [open_embeddings(file) for file in (against, embeddings) if file is not None]
    models = [file.about.get("clip", {}) for file in files]
    if files[0].vectors.shape[1] != files[-1].vectors.shape[1] or models[0] != models[-1]:
        raise DataError(f"cannot compare '{embeddings}' with '{against}'", "different models made them", "embed again")
    # One file stays mapped; two are read.
    vectors = files[0].vectors if len(files) == 1 else torch.cat([file.vectors for file in files])
    pairs = near_pairs(vectors, [vectors.__getitem__], threshold, reporter)
    num_other = len(vectors) - len(files[-1].vectors)
    names = _names(files, num_other, [*{*pairs.first.tolist(), *pairs.second.tolist()}])
    report = report_duplicates(names.__getitem__, (num_other, len(files[-1].vectors)), pairs, threshold, out)
    return report | {"clip": models[-1]}


def _names(files: list[EmbeddingFile], num_other: int, rows: list[int]) -> dict[int, str]:
    """The names of these rows of all files together."""
    named = files[-1].rows([row - num_other for row in rows if row >= num_other])
    found = {row + num_other: about for row, about in named.items()}
    if num_other:
        found |= files[0].rows([row for row in rows if row < num_other])
    if any("name" not in about for about in found.values()):
        raise DataError(f"'{files[-1].file}' does not name its pictures", remedy="make it with `ldm clip embed`")
    return {row: str(about["name"]) for row, about in found.items()}
