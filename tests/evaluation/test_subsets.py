"""The random permutations against numpy's."""

from __future__ import annotations

import numpy
import pytest

from ldm_cli.evaluation.subsets import Permutations


@pytest.mark.parametrize("seed", [0, 2020, 2**31])
def test_permutations_are_those_of_numpy_one_after_the_other(seed: int) -> None:
    ours, theirs = Permutations(seed), numpy.random.RandomState(seed)
    for length in (10, 1, 5000, 2, 129):  # 5000 takes more words than are made at once
        assert ours.next(length).tolist() == theirs.permutation(length).tolist()
