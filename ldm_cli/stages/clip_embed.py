"""`ldm clip embed`: pictures or texts to a file of unit vectors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm_cli.errors import UsageError
from ldm_cli.formats.embedding_files import SUFFIXES, expect_new_embeddings, is_embedding_file, write_embeddings
from ldm_cli.reporting import Reporter
from ldm_cli.stages.support.clip_inputs import Clip, ClipOptions, open_picture_sets, picture_rows, texts_of


def run(
    sources: Sequence[str],
    texts: str | None,
    out: Path,
    options: ClipOptions,
    reporter: Reporter,
    *,
    half: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the embeddings of pictures, or of texts, as `out`.

    Args:
        sources: of the pictures, as in `open_pictures`.
        texts: a file of texts or texts between commas, in place of `sources`.
        out: `.npy` or `.safetensors`.
        half: write float16 in place of float32.

    Returns:
        `file`, `num_embeddings`, `dimension`, `provenance`.

    Raises:
        UsageError: pictures and texts are given, or neither; `out` has another suffix.
        OutputError, StorageError: the file or one of its two texts exists, or cannot be written; other errors as in
            `Clip`.
    """
    if bool(sources) == bool(texts):
        raise UsageError(
            "nothing to embed" if texts is None else "two kinds to embed", remedy="give PICTURES or --texts"
        )
    if not is_embedding_file(out):
        raise UsageError(f"cannot write '{out}'", f"it ends with neither {' nor '.join(SUFFIXES)}")
    expect_new_embeddings(out, overwrite=overwrite)
    sets = open_picture_sets(sources, reporter)
    clip = Clip(options, reporter)
    if texts is None:
        vectors, numbers = clip.pictures(sets)
        rows = picture_rows(sets, numbers)
    else:
        rows = [{"text": text} for text in texts_of(texts, "--texts")]
        vectors = clip.texts([row["text"] for row in rows])
    provenance = clip.provenance()
    write_embeddings(out, vectors.half() if half else vectors, rows, provenance, overwrite=overwrite)
    count, dimension = vectors.shape
    return {"file": str(out), "num_embeddings": count, "dimension": dimension, "provenance": provenance}
