"""Embeddings on disk: a matrix in `x.npy` or `x.safetensors`, where its rows are from in `x.names.jsonl`, and how they
were made in `x.json`.

The matrix is mapped, and of the names only those that are asked for are parsed: millions of rows open at once. A matrix
of another program, without the two texts, is read as well.
"""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_cli.errors import DataError, OutputError
from ldm_cli.formats.json_file import read_json, write_json
from ldm_cli.formats.npy import open_npy, write_npy
from ldm_cli.formats.weight_files import read_tensors, write_tensors
from ldm_cli.inputs import open_input
from ldm_cli.storage import storage_errors, write_whole

SUFFIXES = (".npy", ".safetensors")
_TENSOR = "embeddings"


@dataclass(frozen=True)
class EmbeddingFile:
    """A matrix of embeddings.

    Attributes:
        vectors: float [N, D], mapped.
        about: how it was made; empty if that is unknown.
    """

    file: Path
    vectors: Tensor
    about: Mapping[str, Any]

    def rows(self, numbers: Collection[int]) -> dict[int, dict[str, Any]]:
        """Where these rows are from: `source` and `name` of a picture, or `text`; {} without a file of names.

        Raises:
            DataError: the file of names is damaged, or has other rows than the matrix.
        """
        names, wanted, found = _names(self.file), set(numbers), dict[int, dict[str, Any]]()
        if not names.is_file():
            return {number: {} for number in wanted}
        try:
            with io.TextIOWrapper(open_input(names), encoding="utf-8") as lines:
                for number, line in enumerate(lines):
                    if number in wanted:
                        found[number] = dict(json.loads(line))
                        if len(found) == len(wanted):
                            break
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read '{names}'", str(error)) from error
        if len(found) < len(wanted):
            raise DataError(f"'{names}' has fewer lines than '{self.file}' has rows", f"{len(self.vectors)} are needed")
        return found


def is_embedding_file(path: Path) -> bool:
    """Whether a path is that of an embedding file, by its suffix."""
    return path.suffix in SUFFIXES


def open_embeddings(file: Path) -> EmbeddingFile:
    """The embeddings of a file, ours or the only matrix of another program.

    Raises:
        DataError: it holds no matrix of floats.
        InputNotFoundError, StorageError, CheckpointError: as in `open_npy` and `read_tensors`.
    """
    if file.suffix == ".npy":
        vectors: Tensor | None = open_npy(file)
    else:
        tensors = read_tensors(file)
        vectors = next(iter(tensors.values())) if len(tensors) == 1 else tensors.get(_TENSOR)
    if vectors is None or vectors.ndim != 2 or 0 in vectors.shape or not vectors.is_floating_point():
        found = (
            "several tensors" if vectors is None else f"{vectors.dtype} {list(vectors.shape)}".removeprefix("torch.")
        )
        raise DataError(f"cannot read '{file}'", f"a matrix of embeddings is expected, and it holds {found}")
    about = _about(file)
    return EmbeddingFile(file, vectors, read_json(about) if about.is_file() else {})


def write_embeddings(
    file: Path, vectors: Tensor, rows: Iterable[Mapping[str, Any]], about: Mapping[str, Any], *, overwrite: bool
) -> None:
    """Write a matrix, float [N, D], and its two texts.

    Raises:
        OutputError, StorageError: it exists and is not to be replaced, or cannot be written.
    """
    expect_new_embeddings(file, overwrite=overwrite)
    with storage_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_whole(_names(file), lines)
    write_json(_about(file), about)
    if file.suffix == ".npy":
        write_npy(file, vectors)
    else:
        write_tensors(file, {_TENSOR: vectors})


def expect_new(file: Path, *, overwrite: bool) -> None:
    """Raises OutputError if the file exists and is not to be replaced."""
    if file.exists() and not overwrite:
        raise OutputError(f"'{file}' exists already", remedy="choose another name, or pass --overwrite")


def expect_new_embeddings(file: Path, *, overwrite: bool) -> None:
    """Raises OutputError if the file, or one of its two texts, exists and is not to be replaced."""
    for part in (file, _names(file), _about(file)):
        expect_new(part, overwrite=overwrite)


def _about(file: Path) -> Path:
    return file.with_suffix(".json")


def _names(file: Path) -> Path:
    return file.with_suffix(".names.jsonl")
