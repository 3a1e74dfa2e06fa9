"""Intervals of shares."""

from __future__ import annotations

import pytest

from ldm_cli.evaluation.intervals import NORMAL_QUANTILE, share_interval


@pytest.mark.parametrize(("share", "count"), [(0.75, 200), (0.0, 12), (1.0, 12)])
def test_the_ends_of_a_share_solve_wilsons_equation(share: float, count: int) -> None:
    low, high = share_interval(share, count)
    assert 0 <= low < high <= 1
    for end in (low, high):
        assert (share - end) ** 2 == pytest.approx(NORMAL_QUANTILE**2 * end * (1 - end) / count, abs=1e-9)
