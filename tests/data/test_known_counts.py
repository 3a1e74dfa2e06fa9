"""Training that begins before the shards are indexed: counts out of files beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ldm_cli.data.config import DataConfig
from ldm_cli.data.known_counts import known_count
from ldm_cli.data.loader import Loader
from ldm_cli.data.open_shards import open_shards
from ldm_cli.errors import DataError
from ldm_cli.reporting import SilentReporter
from tests.data.tars import numbered_shards, opened


def test_counts_are_those_of_dali_img2dataset_and_ourselves(tmp_path: Path) -> None:
    (tmp_path / "a.idx").write_text("v1.2 17\njpg 0 12 a.jpg\n")
    (tmp_path / "b_stats.json").write_text('{"count": 8, "successes": 7}')
    (tmp_path / "sizes.json").write_text('{"c.tar": 5, "d.tar": true, "e.tar": -1}')
    found = {name: known_count(tmp_path / f"{name}.tar") for name in "abcdef"}
    assert found == {"a": 17, "b": 7, "c": 5, "d": None, "e": None, "f": None}


def test_batches_and_fingerprint_before_indexing_are_those_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = numbered_shards(tmp_path / "d", [3, 4, 2])
    for shard, count in enumerate((3, 4, 2)):
        (folder / f"{shard:03d}_stats.json").write_text(json.dumps({"successes": count}))
    with monkeypatch.context() as patch:
        patch.setattr("ldm_cli.data.indexing.index_tar", None)  # whoever indexes now fails
        early, config = opened(folder)
    batches = list(Loader(early, config, seed=0, batch_size=4).batches(0, 4))
    late = open_shards(config.shards, config, SilentReporter(), needs_tables=True)
    assert late.fingerprint == early.fingerprint
    assert late.facts.members["png"] == 9
    again = Loader(late, config, seed=0, batch_size=4).batches(0, 4)
    assert [batch.keys for batch in again] == [batch.keys for batch in batches]


def test_a_wrong_count_names_the_shard(tmp_path: Path) -> None:
    folder = numbered_shards(tmp_path / "d", [3, 4])
    (folder / "sizes.json").write_text('{"000.tar": 3, "001.tar": 5}')
    shards, config = opened(folder)
    with pytest.raises(DataError, match=r"001\.tar' has another number of samples: it holds 4 .* says 5"):
        list(Loader(shards, config, seed=0, batch_size=4).batches(0, 2))
    assert [*open_shards(str(folder), DataConfig(shards="x"), SilentReporter(), needs_tables=True).sizes] == [3, 4]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_make_the_tables_and_choices_that_one_process_makes(
    tmp_path: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = numbered_shards(tmp_path / "d", [3, 4, 2, 5])
    settings = {"filter": {"fields": {"number": {"min": 2, "max": 10}}}, "aspect_buckets": {"step": 8}}
    shards, config = opened(folder, num_workers=num_workers, **settings)
    assert [*shards.sizes] == [1, 4, 2, 2]
    monkeypatch.setattr("ldm_cli.data.indexing.index_tar", None)  # whoever indexes or reads again fails
    monkeypatch.setattr("ldm_cli.data.sample_filter._read_facts", None)
    again, _ = opened(folder, **settings)
    assert again.fingerprint == shards.fingerprint
    keys = [key for batch in Loader(again, config, seed=0, batch_size=3).batches(0, 3) for key in batch.keys]
    assert sorted(int(key[-4:]) for key in keys) == [*range(2, 11)]
