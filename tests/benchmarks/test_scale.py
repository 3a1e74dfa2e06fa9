"""The simulation of large data sets, on a small one."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.scale import simulate


def test_a_small_simulation_has_every_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    result = simulate(num_shards=3000, samples=100, num_ranks=16, batch_size=160, positions=200)
    assert result["samples"] == 3000 * 100 - 429
    assert result["equal_positions"] == result["of_positions"] == 200
    assert result["megabytes"] < 50
    assert result["steps_per_window"] == 10
    assert result["new_shards_per_step"] == 1.6
    assert 1 <= result["shards_touched_by_a_rank_in_a_step"] <= 10
