"""Remote shards: allowed by the recipe, fetched once, bounded, and never telling a secret."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from ldm_cli.data.config import DataConfig
from ldm_cli.data.loader import Loader
from ldm_cli.data.remote import StagingArea, without_credentials
from ldm_cli.data.shards import open_shards
from ldm_cli.errors import InputNotFoundError, LdmError, StorageError, UnavailableError
from ldm_cli.reporting import SilentReporter
from tests.data.tars import numbered_shards, opened


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Any]:
    """Three shards in fsspec's file system in memory."""
    system = fsspec.filesystem("memory")
    folder = numbered_shards(tmp_path / "d", [3, 2, 4])
    for path in folder.iterdir():
        system.pipe(f"/bucket/{path.name}", path.read_bytes())
    yield system
    system.rm("/bucket", recursive=True)


def test_remote_shards_give_the_batches_of_local_ones_and_are_fetched_once(memory: Any, tmp_path: Path) -> None:
    reporter = SilentReporter()
    config = DataConfig(shards="memory://bucket/{000..002}.tar", image_size=8, remote_schemes=("memory",))
    shards = open_shards(config.shards, config, reporter)
    local, _ = opened(tmp_path / "d")
    assert shards.fingerprint == local.fingerprint
    batches = [next(Loader(s, config, seed=0, batch_size=9).batches(0, 1)) for s in (shards, local)]
    assert batches[0].keys == batches[1].keys
    assert len([m for m in reporter.messages if m.startswith("fetching")]) == 3
    open_shards(config.shards, config, reporter)
    assert len([m for m in reporter.messages if m.startswith("fetching")]) == 3
    memory.pipe("/bucket/001.tar", (tmp_path / "d/000.tar").read_bytes())  # changed over there
    assert open_shards(config.shards, config, reporter).sizes == (3, 3, 4)


def test_a_missing_remote_shard_is_named(memory: Any) -> None:
    config = DataConfig(shards="memory://bucket/{002..003}.tar", remote_schemes=("memory",))
    with pytest.raises(InputNotFoundError, match=r"memory://bucket/003\.tar"):
        open_shards(config.shards, config, SilentReporter())


def test_fetched_shards_stay_within_their_bound(memory: Any, index_cache: Path) -> None:
    size = memory.info("/bucket/000.tar")["size"]
    area = index_cache.parent / "shards"
    for name in ("000", "001", "002"):
        StagingArea(2 * size + 9000, SilentReporter()).fetch(f"memory://bucket/{name}.tar")
        assert sum(path.stat().st_size for path in area.rglob("*") if path.is_file()) <= 2 * size + 9000
    assert {path.name for path in area.rglob("*.tar")} == {"001.tar", "002.tar"}, "the oldest gave way"
    one_run = StagingArea(2 * size + 9000, SilentReporter())
    one_run.fetch("memory://bucket/000.tar")
    one_run.fetch("memory://bucket/001.tar")
    with pytest.raises(StorageError, match="max_fetched_bytes"):
        one_run.fetch("memory://bucket/002.tar")


def test_secrets_are_in_no_message_and_no_file(index_cache: Path) -> None:
    assert without_credentials("s3://user:word@host/a/b.tar?sig=word#x") == "s3://host/a/b.tar"
    url = "http://user:secretword@127.0.0.1:9/a.tar?sig=secretword"
    reporter = SilentReporter()
    for schemes in ((), ("http",)):
        config = DataConfig(shards=url, remote_schemes=schemes)
        with pytest.raises(LdmError) as caught:
            open_shards(url, config, reporter)
        assert "secretword" not in str(caught.value) + "".join(reporter.messages)
        assert "127.0.0.1" in str(caught.value)
    assert not any("secretword" in str(path) for path in index_cache.parent.rglob("*"))


def test_a_back_end_that_is_not_installed_is_named() -> None:
    config = DataConfig(shards="nosuch://a/b.tar", remote_schemes=("nosuch",))
    with pytest.raises(UnavailableError, match="nosuch"):
        open_shards(config.shards, config, SilentReporter())


def test_shards_come_over_http(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    folder = numbered_shards(tmp_path / "d", [3])

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(folder))

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/000.tar"
        config = DataConfig(shards=url, remote_schemes=("http",))
        assert open_shards(url, config, SilentReporter()).num_samples == 3
        server.shutdown()
