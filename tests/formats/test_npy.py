"""Single arrays and files of embeddings, against numpy and safetensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ldm_cli.errors import DataError, InputNotFoundError, OutputError
from ldm_cli.formats.embedding_files import open_embeddings, write_embeddings
from ldm_cli.formats.npy import open_npy, write_npy


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int64])
def test_arrays_of_numpy_are_mapped(order: str, dtype: type, tmp_path: Path) -> None:
    array = np.asarray(np.arange(12).reshape(3, 4), dtype=dtype, order=order)  # type: ignore[call-overload]
    np.save(tmp_path / "x.npy", array)
    found = open_npy(tmp_path / "x.npy")
    assert (found.tolist(), found.numpy().dtype) == (array.tolist(), array.dtype)
    with (tmp_path / "x.npy").open("r+b") as stream:  # the pages are the file's until they are written to
        stream.seek(-array.itemsize, 2)
        stream.write(np.asarray(7, dtype).tobytes())
    assert found[2, 3].item() == 7
    found[0, 0] = 5
    assert np.load(tmp_path / "x.npy")[0, 0] == 0


def test_numpy_reads_what_is_written(tmp_path: Path) -> None:
    matrix = torch.randn(3, 5).half().T
    write_npy(tmp_path / "x.npy", matrix)
    assert np.load(tmp_path / "x.npy").tolist() == matrix.tolist()


def test_damaged_files_and_other_types_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.npy"
    with pytest.raises(InputNotFoundError):
        open_npy(file)
    np.save(file, np.zeros((3, 4)))
    for content in (b"", b"no array", file.read_bytes()[:-1]):
        (tmp_path / "bad.npy").write_bytes(content)
        with pytest.raises(DataError, match=r"it is no \.npy file"):
            open_npy(tmp_path / "bad.npy")
    np.save(file, np.zeros(3, dtype=complex))
    with pytest.raises(DataError, match="no numbers of a type that is read"):
        open_npy(file)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_embeddings_are_read_back_with_the_names_that_are_asked_for(suffix: str, tmp_path: Path) -> None:
    file, vectors = tmp_path / f"new/x{suffix}", torch.randn(4, 3)
    rows = [{"source": "a\nb", "name": f"ü{i}"} for i in range(4)]
    write_embeddings(file, vectors, rows, {"clip": "x"}, overwrite=False)
    found = open_embeddings(file)
    assert torch.equal(found.vectors, vectors)
    assert (found.about, found.rows([2, 0, 2])) == ({"clip": "x"}, {0: rows[0], 2: rows[2]})
    with pytest.raises(OutputError, match="exists already"):
        write_embeddings(file, vectors, rows, {}, overwrite=False)
    write_embeddings(file, vectors, rows[:2], {}, overwrite=True)
    with pytest.raises(DataError, match="fewer lines than"):
        open_embeddings(file).rows([3])


def test_a_matrix_of_another_program_needs_no_names(tmp_path: Path) -> None:
    save_file({"anything": torch.ones(2, 3)}, tmp_path / "x.safetensors")
    found = open_embeddings(tmp_path / "x.safetensors")
    assert (found.vectors.tolist(), found.about, found.rows([1])) == ([[1.0] * 3] * 2, {}, {1: {}})
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "two.safetensors")
    np.save(tmp_path / "whole.npy", np.ones((2, 3), dtype=np.int64))
    for name in ("two.safetensors", "whole.npy"):
        with pytest.raises(DataError, match="a matrix of embeddings is expected"):
            open_embeddings(tmp_path / name)
