"""Shards of a web server that is slow, cuts answers and changes objects, in a cache that holds a tenth of them."""

from __future__ import annotations

import hashlib
import http.server
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ldm_cli.data import staging
from ldm_cli.data.batch import Batch
from ldm_cli.data.bounded_folder import BoundedFolder
from ldm_cli.data.config import DataConfig
from ldm_cli.data.loader import Loader
from ldm_cli.data.open_shards import open_shards
from ldm_cli.errors import DataError, InputNotFoundError, StorageError
from ldm_cli.reporting import SilentReporter
from tests.data.tars import numbered_shards, opened


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; `fault` says how an answer fails."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.folder, self.requests, self.is_faulty = folder, Counter[str](), False
        self.statuses: dict[str, int] = {}
        self.dice = random.Random(0)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fault(self) -> str:
        """One of four requests fails while the server is faulty."""
        return self.dice.choice(["503", "cut", "reset", "slow"]) if self.is_faulty and self.dice.random() < 0.25 else ""


class _Answer(http.server.BaseHTTPRequestHandler):
    server: Server
    disable_nagle_algorithm = True  # it would wait 40 ms between the header and the content of an answer

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(None)

    def _answer(self, body: bytes | None) -> None:
        path = self.server.folder / self.path[1:]
        content, fault = path.read_bytes(), self.server.fault()
        if status := self.server.statuses.get(path.name) or (503 if fault == "503" else 0):
            self.send_error(status)
            return
        if fault == "slow":
            time.sleep(0.03)
        if body is None:
            self.server.requests[path.name] += 1
            body = content[: len(content) // 2] if fault == "cut" else content
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", hashlib.sha256(content).hexdigest())
        self.end_headers()
        if fault != "reset":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(staging, "_PAUSES", (0.01,) * 12)
    folder = numbered_shards(tmp_path / "d", [2] * 100)
    with Server(folder) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield serving
        serving.shutdown()


def _config(server: Server, num_shards: int, **settings: object) -> DataConfig:
    facts = {"image_size": 8, "remote_schemes": ["http"], "shuffle_window": 4}
    shards = f"{server.address}/{{000..{num_shards - 1:03d}}}.tar"
    return DataConfig.from_mapping({"shards": shards, **facts, **settings})


def _trace(batches: list[Batch]) -> list[str]:
    return [line for step, batch in enumerate(batches) for line in batch.trace(step)]


@pytest.mark.parametrize("num_workers", [pytest.param(0, marks=pytest.mark.exhaustive), 2])
def test_a_faulty_server_and_a_small_cache_change_neither_trace_nor_bits(
    server: Server, index_cache: Path, num_workers: int
) -> None:
    size = (server.folder / "000.tar").stat().st_size + 200  # with what is kept beside it
    config = _config(server, 100, max_fetched_bytes=10 * size, num_workers=num_workers)
    area, most = index_cache.parent / "shards", 0
    room = BoundedFolder(area, 0)
    server.is_faulty = True
    remote = open_shards(config.shards, config, SilentReporter())
    loader = Loader(remote, config, seed=1, batch_size=8)
    found = []
    for batch in loader.batches(0, 38):  # an epoch and a half
        found.append(batch)
        with room.locked():  # no shard comes or goes meanwhile
            most = max(most, len({path.parent for path in area.rglob("*.tar")}))
    local, settings = opened(server.folder, shuffle_window=4)
    expected = list(Loader(local, settings, seed=1, batch_size=8).batches(0, 38))
    assert _trace(found) == _trace(expected)
    assert all(torch.equal(one.images, other.images) for one, other in zip(found, expected, strict=True))
    assert remote.fingerprint == local.fingerprint
    assert 8 < most <= 10, "the bound"
    again = open_shards(config.shards, config, SilentReporter())
    (resumed,) = Loader(again, config, seed=1, batch_size=8).batches(30, 31)
    assert resumed.keys == expected[30].keys


def test_the_next_window_is_fetched_before_it_is_needed(server: Server) -> None:
    config = _config(server, 16)
    shards = open_shards(config.shards, config, SilentReporter())
    for path in shards.paths:
        path.unlink()
    server.requests.clear()
    batches = Loader(shards, config, seed=0, batch_size=2).batches(0, 16)
    next(batches)
    deadline = time.monotonic() + 20
    while len(server.requests) < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(server.requests) == 8, "this window's four shards and the next one's"
    batches.close()


@pytest.mark.parametrize(("status", "kind"), [(403, StorageError), (404, InputNotFoundError), (503, StorageError)])
def test_a_status_that_lasts_names_the_shard(server: Server, status: int, kind: type[Exception]) -> None:
    config = _config(server, 4)
    shards = open_shards(config.shards, config, SilentReporter())
    shards.paths[2].unlink()
    server.statuses["002.tar"] = status
    with pytest.raises(kind, match=r"002\.tar"):
        list(Loader(shards, config, seed=0, batch_size=4).batches(0, 2))


def test_an_object_that_changes_in_the_middle_stops_the_run_and_names_it(server: Server) -> None:
    config = _config(server, 4)
    shards = open_shards(config.shards, config, SilentReporter())
    shards.paths[1].unlink()
    (server.folder / "001.tar").write_bytes((server.folder / "009.tar").read_bytes())
    with pytest.raises(DataError, match=r"001\.tar' has changed"):
        list(Loader(shards, config, seed=0, batch_size=4).batches(0, 2))
    assert open_shards(config.shards, config, SilentReporter()).fingerprint != shards.fingerprint
