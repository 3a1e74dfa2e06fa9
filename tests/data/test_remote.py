"""Remote shards: allowed by the recipe, fetched once, bounded, and never telling a secret."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from ldm_cli.data import remote, staging
from ldm_cli.data.config import DataConfig
from ldm_cli.data.loader import Loader
from ldm_cli.data.open_shards import open_shards
from ldm_cli.data.remote import without_credentials
from ldm_cli.data.shards import ShardSet
from ldm_cli.data.staging import StagingArea
from ldm_cli.errors import DataError, InputNotFoundError, LdmError, StorageError, UnavailableError
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
    system.store.clear()
    system.pseudo_dirs[:] = [""]


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
    assert open_shards(config.shards, config, reporter).sizes == array("q", (3, 3, 4))


def test_a_missing_remote_shard_is_named(memory: Any) -> None:
    config = DataConfig(shards="memory://bucket/{002..003}.tar", remote_schemes=("memory",))
    with pytest.raises(InputNotFoundError, match=r"memory://bucket/003\.tar"):
        open_shards(config.shards, config, SilentReporter())


def test_fetched_shards_stay_within_their_bound(memory: Any, index_cache: Path) -> None:
    size = memory.info("/bucket/000.tar")["size"]
    area = index_cache.parent / "shards"
    for name in ("000", "001", "002"):
        _fetch(StagingArea(2 * size + 9000, SilentReporter()), f"memory://bucket/{name}.tar")
        assert sum(path.stat().st_size for path in area.rglob("*") if path.is_file()) <= 2 * size + 9000
    assert {path.name for path in area.rglob("*.tar")} == {"001.tar", "002.tar"}, "the oldest gave way"
    one_run = StagingArea(2 * size + 9000, SilentReporter())
    _fetch(one_run, "memory://bucket/000.tar")
    _fetch(one_run, "memory://bucket/001.tar")
    _fetch(one_run, "memory://bucket/002.tar")
    assert {path.name for path in area.rglob("*.tar")} == {"001.tar", "002.tar"}, "a run's own shards give way, too"
    with pytest.raises(StorageError, match="max_fetched_bytes"):
        _fetch(StagingArea(1000, SilentReporter()), "memory://bucket/000.tar")


def _fetch(area: StagingArea, url: str) -> Path:
    """The shard as it is at its server now."""
    return area.fetch(url, area.stamp(url))


def _area_of(memory: Any, num_shards: int, reporter: SilentReporter | None = None) -> StagingArea:
    """A staging area with room for so many shards, and what belongs to them."""
    return StagingArea(num_shards * (memory.info("/bucket/000.tar")["size"] + 3000), reporter or SilentReporter())


def test_shards_of_an_open_data_set_are_never_removed(
    memory: Any, index_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by another data set of the same process, nor by another process while one that was forked lives."""
    monkeypatch.setattr(staging, "_PATIENCE", 0.5)
    first = _area_of(memory, 2)
    held = _fetch(first, "memory://bucket/000.tar")
    _fetch(_area_of(memory, 2), "memory://bucket/001.tar")
    _fetch(_area_of(memory, 2), "memory://bucket/002.tar")
    assert held.exists()
    assert {path.name for path in (index_cache.parent / "shards").rglob("*.tar")} == {"000.tar", "002.tar"}
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.read(reading, 1)
        os._exit(0)
    del first
    with pytest.raises(StorageError, match="in use"):
        _fetch(_area_of(memory, 1), "memory://bucket/001.tar")
    os.write(writing, b"0")
    os.waitpid(child, 0)
    _fetch(_area_of(memory, 1), "memory://bucket/001.tar")
    assert not held.exists()
    assert len(list((index_cache.parent / "shards").glob(".lease-*"))) <= 2, "notes of the dead are cleared away"


def test_validation_data_do_not_push_out_training_data(memory: Any) -> None:
    bound = 2 * memory.info("/bucket/000.tar")["size"] + 3000

    def opened_with_bound(name: str) -> ShardSet:
        config = DataConfig(
            shards=f"memory://bucket/{name}.tar", image_size=8, remote_schemes=("memory",), max_fetched_bytes=bound
        )
        return open_shards(config.shards, config, SilentReporter())

    train = opened_with_bound("000")
    for name in ("001", "002"):
        opened_with_bound(name)
    config = DataConfig(shards="x", image_size=8)
    assert len(next(Loader(train, config, seed=0, batch_size=3).batches(0, 1)).keys) == 3


def test_addresses_that_differ_in_the_query_alone_are_different_shards(memory: Any) -> None:
    for name in ("000", "001"):
        memory.pipe(f"/bucket/get?shard={name}", memory.cat(f"/bucket/{name}.tar"))
    config = DataConfig(shards="memory://bucket/get?shard={000,001}", remote_schemes=("memory",))
    assert open_shards(config.shards, config, SilentReporter()).sizes == array("q", (3, 2))


class _Answer(Exception):
    """Stands for what a library for HTTP raises."""

    def __init__(self, status: int) -> None:
        super().__init__("with the secretword of an address")
        self.status = status


def _failing(call: Callable[..., Any], errors: list[BaseException]) -> Callable[..., Any]:
    """`call`, but the first of its calls raise."""

    def wrapped(*arguments: Any, **options: Any) -> Any:
        if errors:
            raise errors.pop(0)
        return call(*arguments, **options)

    return wrapped


def _masked(status: int) -> FileNotFoundError:
    error = FileNotFoundError("secretword")
    error.__cause__ = _Answer(status)
    return error


@pytest.mark.parametrize("method", ["info", "open"])
@pytest.mark.parametrize("make", [lambda: _Answer(503), lambda: _masked(500), lambda: ConnectionResetError(104, "")])
def test_what_may_pass_is_tried_again(
    memory: Any, monkeypatch: pytest.MonkeyPatch, method: str, make: Callable[[], BaseException]
) -> None:
    monkeypatch.setattr(staging, "_PAUSES", (0.0, 0.0, 0.0))
    call = getattr(memory, method)
    monkeypatch.setattr(memory, method, _failing(call, [make() for _ in range(3)]))
    reporter = SilentReporter()
    fetched = _area_of(memory, 3, reporter) if method == "open" else StagingArea(10**9, reporter)
    assert _fetch(fetched, "memory://bucket/000.tar").read_bytes() == memory.cat("/bucket/000.tar")
    assert sum("next attempt in 0 s" in message for message in reporter.messages) == 3
    monkeypatch.setattr(memory, method, _failing(call, [make() for _ in range(4)]))
    with pytest.raises(StorageError, match=r"001\.tar") as caught:
        _fetch(fetched, "memory://bucket/001.tar")
    assert "secretword" not in str(caught.value) + "".join(reporter.messages)


def test_without_its_server_a_run_goes_on_with_what_was_fetched(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is said; the server is tried again for the first shard alone, and what never came is an error."""
    monkeypatch.setattr(staging, "_PAUSES", (0.0, 0.0, 0.0))
    config = DataConfig(shards="memory://bucket/{000..001}.tar", remote_schemes=("memory",))
    before = open_shards(config.shards, config, SilentReporter())
    failures: list[BaseException] = [ConnectionResetError(104, "") for _ in range(6)]
    monkeypatch.setattr(staging, "server_facts", _failing(remote.server_facts, failures))  # of all threads
    reporter = SilentReporter()
    assert open_shards(config.shards, config, reporter).fingerprint == before.fingerprint
    assert sum("using the copy that was fetched before" in message for message in reporter.messages) == 2
    assert len(failures) == 1
    failures += [ConnectionResetError(104, "") for _ in range(6)]
    with pytest.raises(StorageError, match=r"002\.tar"):
        _fetch(StagingArea(10**9, reporter), "memory://bucket/002.tar")


@pytest.mark.parametrize(
    ("error", "kind"),
    [(_masked(404), InputNotFoundError), (_Answer(403), StorageError), (PermissionError("secret"), StorageError)],
)
def test_what_lasts_is_told_at_once(
    memory: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException, kind: type[LdmError]
) -> None:
    monkeypatch.setattr(memory, "info", _failing(memory.info, [error]))
    reporter = SilentReporter()
    with pytest.raises(kind):
        _fetch(StagingArea(10**9, reporter), "memory://bucket/000.tar")
    assert reporter.messages == []


class _Cut:
    """A remote file of which half comes."""

    def __init__(self, source: Any, size: int) -> None:
        self._source, self._left = source, size // 2

    def __enter__(self) -> _Cut:
        return self

    def __exit__(self, *_: object) -> None:
        self._source.close()

    def read(self, size: int) -> bytes:
        chunk: bytes = self._source.read(min(size, self._left))
        self._left -= len(chunk)
        return chunk


def test_a_body_that_is_cut_is_noticed_and_fetched_again(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its announced size; where none is announced, as a damaged shard, which the next start fetches again."""
    monkeypatch.setattr(staging, "_PAUSES", (0.0,))
    info, open_file = memory.info, memory.open
    size = info("/bucket/000.tar")["size"]
    config = DataConfig(shards="memory://bucket/000.tar", remote_schemes=("memory",))
    monkeypatch.setattr(memory, "open", lambda *a, **k: _Cut(open_file(*a, **k), size))
    with pytest.raises(StorageError, match=f"received {size // 2} bytes of {size}"):
        open_shards(config.shards, config, SilentReporter())
    monkeypatch.setattr(memory, "info", lambda path, **k: {"name": path})
    with pytest.raises(DataError, match="end-of-archive"):
        open_shards(config.shards, config, SilentReporter())
    monkeypatch.setattr(memory, "open", open_file)
    assert open_shards(config.shards, config, SilentReporter()).sizes == array("q", (3,))


def test_a_shard_of_unknown_size_stays_within_the_bound(
    memory: Any, index_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "CHUNK", 1024)
    monkeypatch.setattr(memory, "info", lambda path, **k: {"name": path})
    with pytest.raises(StorageError, match="max_fetched_bytes=9000"):
        _fetch(StagingArea(9000, SilentReporter()), "memory://bucket/000.tar")
    assert not list((index_cache.parent / "shards").rglob("*.tar"))


def test_secrets_are_in_no_message_and_no_file(index_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_PAUSES", (0.01, 0.01, 0.01))
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
