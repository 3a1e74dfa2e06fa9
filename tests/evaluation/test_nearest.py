"""The nearest vectors against numpy's brute force."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ldm_cli.errors import DivergedError
from ldm_cli.evaluation import nearest as module
from ldm_cli.evaluation.nearest import nearest
from ldm_cli.formats.npy import open_npy


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_search_in_blocks_of_a_mapped_file_equals_brute_force(
    dtype: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BYTES_PER_BLOCK", 7 * 4 * 12)
    generator = np.random.default_rng(0)
    vectors = (generator.normal(size=(200, 12)) * generator.uniform(0.1, 9, (200, 1))).astype(dtype)
    queries = generator.normal(size=(5, 12)).astype(np.float32)
    np.save(tmp_path / "x.npy", vectors)
    cosines, rows = nearest(torch.from_numpy(queries), open_npy(tmp_path / "x.npy"), 10)
    wide = vectors.astype(np.float64)
    expected = queries @ wide.T / np.linalg.norm(queries, axis=1)[:, None] / np.linalg.norm(wide, axis=1)
    order = np.argsort(-expected, axis=1, kind="stable")[:, :10]
    assert rows.tolist() == order.tolist()
    assert np.allclose(cosines.numpy(), np.take_along_axis(expected, order, 1), atol=1e-6)


def test_of_equal_cosines_the_lower_row_comes_first_over_the_borders_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BYTES_PER_BLOCK", 4 * 4 * 2)
    vectors = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(20, 1)
    cosines, rows = nearest(torch.tensor([[1.0, 0.0]]), vectors, 23)
    assert rows[0].tolist() == [*range(1, 40, 2), 0, 2, 4]
    assert cosines[0].tolist() == [1.0] * 20 + [0.0] * 3


def test_there_are_no_more_results_than_vectors_and_a_zero_vector_has_cosine_0() -> None:
    cosines, rows = nearest(torch.ones(2, 3), torch.tensor([[0.0, 0.0, 0.0], [-1.0, -1.0, -1.0]]), 10)
    assert rows.tolist() == [[0, 1]] * 2
    assert cosines.flatten().tolist() == pytest.approx([0.0, -1.0] * 2)


def test_vectors_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[1, 2\], vectors \[4, 3\]"):
        nearest(torch.ones(1, 2), torch.ones(4, 3), 1)
    vectors = torch.ones(9, 3)
    vectors[7, 1] = torch.nan
    with pytest.raises(DivergedError, match="row 7 of the embeddings is not finite"):
        nearest(torch.ones(1, 3), vectors, 1)
