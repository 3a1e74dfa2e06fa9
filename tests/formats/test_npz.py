"""Archives of arrays against numpy, both ways."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch

from ldm_cli.errors import DataError
from ldm_cli.formats.npz import read_npz, write_npz


def test_numpy_reads_the_arrays_that_are_written(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    matrix = torch.arange(6, dtype=torch.float64).view(2, 3).T
    write_npz(file, {"mu": torch.arange(3.0), "sigma": matrix, "n": torch.tensor(7), "text": "näher", "none": ""})
    with numpy.load(file) as found:
        assert found["sigma"].tolist() == matrix.tolist()
        assert (found["mu"].dtype, found["sigma"].dtype, int(found["n"])) == (numpy.float32, numpy.float64, 7)
        assert (str(found["text"]), str(found["none"])) == ("näher", "")
    written = file.read_bytes()
    write_npz(file, read_npz(file))
    assert file.read_bytes() == written


@pytest.mark.parametrize("save", [numpy.savez, numpy.savez_compressed])
def test_arrays_of_numpy_are_read_in_every_order_and_type(tmp_path: Path, save: object) -> None:
    file = tmp_path / "a.npz"
    base = numpy.arange(24.0).reshape(2, 3, 4)
    arrays = {
        "plain": base,
        "fortran": numpy.asfortranarray(base),
        "single": base.astype(numpy.float32),
        "integers": base.astype(numpy.int64),
        "bytes": base.astype(numpy.uint8),
        "empty": numpy.zeros((0, 3)),
        "scalar": numpy.float64(2.5),
    }
    save(file, **arrays)  # type: ignore[operator]
    found = read_npz(file)
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        tensor = found[name]
        assert isinstance(tensor, torch.Tensor)
        assert (tensor.numpy().dtype, tensor.tolist()) == (array.dtype, array.tolist())


def test_pickled_objects_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    numpy.savez(file, objects=numpy.array([{"a": 1}], dtype=object), x=numpy.zeros(1))
    assert list(read_npz(file)) == ["x"]


def test_files_that_are_no_archives_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    file.write_bytes(b"no zip")
    with pytest.raises(DataError, match=r"cannot read '.*a\.npz': it is no \.npz archive"):
        read_npz(file)
    write_npz(file, {"x": torch.zeros(100)})
    data = file.read_bytes()
    file.write_bytes(data.replace(b"x.npy", b"x.npx"))
    assert read_npz(file) == {}
