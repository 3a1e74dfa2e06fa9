"""What `ldm data` tells of shards."""

from __future__ import annotations

from pathlib import Path

from ldm_cli.data import report
from ldm_cli.reporting import SilentReporter

from .tars import numbered_sample, opened, png, write_tar


def test_stats_reads_headers_and_check_decodes(tmp_path: Path) -> None:
    cut = [("cut.png", png(size=(90, 70))[:60]), ("cut.txt", b"a cut picture"), ("cut.cls", b"1")]
    shards, config = opened(write_tar(tmp_path / "a.tar", [*numbered_sample(0), *cut]))
    counted = report.stats(shards, config, SilentReporter())
    assert (counted["unusable"], counted["formats"], counted["width"]["max"]) == ({}, {"png": 2}, 90)
    assert report.check(shards, config, SilentReporter())["bad"] == {"damaged image": 1}
