"""Shards that are read as they come: every sample once a pass, nothing mispaired, damage noticed, no process left."""

from __future__ import annotations

import json
import os
import shlex
import signal
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ldm_cli.cli.app import run as ldm_run
from ldm_cli.data.batch import Batch
from ldm_cli.data.config import DataConfig
from ldm_cli.data.loader import Loader, sequential_batches
from ldm_cli.data.open_shards import open_shards
from ldm_cli.data.streaming import open_stream
from ldm_cli.errors import DataError, InputNotFoundError, RecipeError, StorageError, UnavailableError
from ldm_cli.reporting import SilentReporter

from ..stages.tiny import vae_recipe
from .tars import numbered_sample, numbered_shards, png, write_tar


def settings(*shards: str | Path, **more: Any) -> DataConfig:
    given = {"shards": [str(shard) for shard in shards], "stream": True, "remote_schemes": ["pipe", "file"]}
    return DataConfig.from_mapping({**given, "image_size": 8, "label": "cls", **more})


def loader(config: DataConfig, batch_size: int = 4, **options: Any) -> Loader:
    return Loader(open_stream(config, SilentReporter()), config, seed=0, batch_size=batch_size, **options)


def numbers(batches: list[Batch]) -> list[int]:
    """The numbers of samples, of which picture, caption and class tell the same."""
    found = []
    for batch in batches:
        assert batch.labels is not None
        for image, caption, label, key in zip(batch.images, batch.captions, batch.labels, batch.keys, strict=True):
            number = int(label)
            assert image[:, 0, 0].tolist() == [number % 256, number // 256, 77]
            assert (caption, key.partition("/")[2]) == (f"caption {number}", f"{number:04d}")
            found.append(number)
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def expect_gone(pids: list[int]) -> None:
    assert pids
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return numbered_shards(tmp_path / "shards", [5, 4, 7])


def test_a_pass_holds_every_sample_once_and_the_next_one_another_order(folder: Path) -> None:
    files = sorted(map(str, folder.glob("*.tar")))
    found = numbers([*loader(settings(f"pipe:cat {files[0]}", files[1], f"file://{files[2]}")).batches(0, 8)])
    assert sorted(found[:16]) == sorted(found[16:]) == list(range(16))
    assert found[:16] != found[16:] != list(range(16))


@pytest.mark.parametrize("num_workers", [0, 1, 2, 5])
@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_and_workers_share_the_samples(folder: Path, num_workers: int, world_size: int) -> None:
    config, found = settings(folder, num_workers=num_workers, stream_buffer=3), []
    for rank in range(world_size):
        found += numbers([*loader(config, rank=rank, world_size=world_size).batches(0, 40)])
    counts = Counter(found)
    assert set(counts) == set(range(16))
    assert counts.total() == 160
    assert max(counts.values()) <= 2 * min(counts.values()), counts


def test_random_numbers_of_a_step_are_its_own_wherever_a_run_goes_on(folder: Path) -> None:
    whole = [*loader(settings(folder)).batches(0, 4)]
    (last,) = loader(settings(folder)).batches(3, 4)
    assert last.position.tolist() == whole[3].position.tolist() == [12, 13, 14, 15]


def test_a_stream_has_the_samples_of_an_index(tmp_path: Path) -> None:
    names = ("/absolute", "../up", "x/../y", "__meta__/x", "x/__meta__/y", "deep/er/a", "./b", "é猫", "n" * 200)
    members = [
        m for n in names for m in ((f"{n}.png", png()), (f"{n}.TXT", b"text"), (f"{n}.cls", b"1"), (f"{n}.pkl", b"x"))
    ]
    shard = write_tar(tmp_path / "a.tar", members, tarfile.PAX_FORMAT)
    streamed, indexed = settings(shard), settings(shard, stream=False)
    found = [
        [key for batch in sequential_batches(shards, streamed, 4) for key in batch.keys]
        for shards in (open_stream(streamed, SilentReporter()), open_shards(str(shard), indexed, SilentReporter()))
    ]
    assert found[0] == found[1]
    assert len(found[0]) == 5


@pytest.mark.parametrize("place", [100, 148, 156])
def test_a_damaged_header_in_a_stream_is_noticed(folder: Path, place: int) -> None:
    data = bytearray((shard := folder / "000.tar").read_bytes())
    data[data.index(b"0002.png") + place] ^= 4
    shard.write_bytes(data)
    stream = open_stream(config := settings(shard), SilentReporter())
    with pytest.raises(DataError, match="damaged header"):
        list(sequential_batches(stream, config, 4))


def test_a_named_pipe_is_a_shard(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "fifo.tar")
    writer = threading.Thread(target=lambda: pipe.write_bytes((folder / "002.tar").read_bytes()))
    writer.start()
    stream = open_stream(config := settings(pipe), SilentReporter())
    batches = [*sequential_batches(stream, config, 4)]
    writer.join()
    assert numbers(batches) == list(range(9, 16))
    assert batches[0].keys[0] == "fifo/0009"


def test_json_members_come_along_where_they_are_wanted(folder: Path) -> None:
    stream = open_stream(config := settings(folder), SilentReporter())
    (batch,) = sequential_batches(stream, config, 4, limit=4, with_json=True)
    assert batch.metadata == [{"number": number} for number in range(4)]


def test_captions_alone_may_be_read(folder: Path) -> None:
    stream = open_stream(config := settings(folder), SilentReporter())
    batches = sequential_batches(stream, config, 3, limit=7, with_images=False)
    assert [caption for batch in batches for caption in batch.captions] == [f"caption {n}" for n in range(7)]


@pytest.mark.parametrize("piped", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_a_shard_cut_anywhere_is_damaged_and_pairs_nothing_wrongly(tmp_path: Path, piped: bool) -> None:
    whole = write_tar(tmp_path / "whole.tar", [m for n in range(3) for m in numbered_sample(n)]).read_bytes()
    follower = write_tar(tmp_path / "next.tar", [m for n in range(3) for m in numbered_sample(n)])  # of the same keys
    ends = [whole.index(f"{n + 1:04d}.png".encode()) for n in range(2)]  # of the first and the second sample
    for end in range(0 if piped else 1, len(whole) - 9728, 1280 if piped else 768):
        (cut := tmp_path / "cut.tar").write_bytes(whole[:end])
        source = f"pipe:cat {cut}" if piped else str(cut)
        stream = open_stream(config := settings(source, follower), SilentReporter())
        with pytest.raises(DataError, match="is damaged"):
            list(sequential_batches(stream, config, 4))
        bad: list[Any] = []
        config = settings(source, follower, on_bad_shard="skip")
        found = numbers([*sequential_batches(stream, config, 4, report_bad=bad.append)])
        assert [one.reason for one in bad] == ["damaged shard"]
        assert found[-3:] == [0, 1, 2]
        assert found[:-3] == list(range(len(found) - 3))
        assert len(found) - 3 >= sum(e <= end for e in ends) - 1  # the one before the damage may be given up
        assert len(found) - 3 <= sum(e <= end for e in ends) + (end > len(whole) - 10240)


def test_a_command_that_fails_is_named_without_its_arguments(folder: Path) -> None:
    shard = folder / "000.tar"
    for command in (f"cat {shard}; exit 3", f"head -c 2000 {shard}; exit 3", "exit 3"):
        with pytest.raises(StorageError, match="cannot read shard 'pipe-0") as error:
            next(loader(settings(f"pipe:{command}")).batches(0, 1))
        assert "ended with exit code 3" in error.value.cause
        assert str(shard) not in str(error.value)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_endless_command_ends_with_its_loader(folder: Path, tmp_path: Path, num_workers: int) -> None:
    script = tmp_path / "endless"
    script.write_text(f"echo $$ >> {tmp_path}/pids; cat {folder}/000.tar | head -c -10240; exec sleep 1000\n")
    config = settings(f"pipe:exec sh {script}", stream_buffer=1, num_workers=num_workers)
    batches = loader(config, batch_size=2).batches(0, 4)
    assert len(next(batches)) == 2
    batches.close()
    expect_gone([int(line) for line in (tmp_path / "pids").read_text().split()])


def test_a_waiting_command_ends_with_a_killed_run(tmp_path: Path) -> None:
    script, pids = tmp_path / "waits", tmp_path / "pids"
    script.write_text(f"sleep 1000 & echo $! $$ > {pids}.part; mv {pids}.part {pids}; wait\n")
    config = settings(f"pipe:true | sh {script}; true")
    trainer = os.fork()
    if trainer == 0:
        next(loader(config).batches(0, 1))
        os._exit(1)
    wait_until(pids.exists)
    os.kill(trainer, signal.SIGKILL)
    os.waitpid(trainer, 0)
    expect_gone([int(pid) for pid in pids.read_text().split()])


def test_a_reader_whose_shard_is_empty_gets_samples_from_the_next_pass(folder: Path, tmp_path: Path) -> None:
    empty = write_tar(tmp_path / "empty.tar", [])
    config = settings(folder / "000.tar", empty, num_workers=2)
    assert set(numbers([*loader(config).batches(0, 10)])) == set(range(5))


def test_what_is_no_plain_tar_or_too_large_is_refused(folder: Path, tmp_path: Path) -> None:
    large = write_tar(tmp_path / "large.tar", [("a.png", bytes(300_000)), ("a.txt", b"a")])
    (tmp_path / "page.tar").write_bytes(b"<html>" * 500)
    for source, cause in {
        f"pipe:gzip -c {shlex.quote(str(folder / '000.tar'))}": "compressed with gzip",
        str(large): "a member of more than data.max_member_bytes=1000",
        str(tmp_path / "page.tar"): "",
        f"pipe:cat {folder}/000.tar {folder}/001.tar": "data behind the end of the archive",
        "pipe:true": "",
    }.items():
        with pytest.raises(DataError, match="is damaged") as error:
            next(loader(settings(source, max_member_bytes=1000)).batches(0, 2))
        assert cause in error.value.cause


def test_bad_samples_are_passed_over_and_counted(tmp_path: Path) -> None:
    members = [m for n in range(9) for m in numbered_sample(n)]
    bad = [("bad.png", b"no picture"), ("bad.cls", b"1"), ("bad.txt", b"bad")]
    twice = [("twice.png", png()), ("twice.png", png())]
    shard = write_tar(tmp_path / "a.tar", [*members, *bad, *twice, ("no-extension", b"")])
    found: list[Any] = []
    config = settings(shard, max_bad_fraction=0.5)
    batches = [*loader(config, batch_size=3, report_bad=found.append).batches(0, 6)]
    assert Counter(numbers(batches)) == dict.fromkeys(range(9), 2)
    assert {(one.key, one.reason) for one in found} == {("bad", "not an image"), ("twice", "duplicate members")}
    only_bad = settings(write_tar(tmp_path / "b.tar", bad), max_bad_fraction=1)
    with pytest.raises(DataError, match="cannot use any of"):
        next(loader(only_bad).batches(0, 1))
    with pytest.raises(DataError, match="there are no samples in the streams"):
        next(loader(settings(write_tar(tmp_path / "c.tar", []))).batches(0, 1))


def test_only_what_the_recipe_allows_is_opened(folder: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    for config in (
        settings(f"pipe:touch {ran}", remote_schemes=[]),
        settings(f"pipe:touch {ran}", stream=False),
        settings("s3://bucket/a.tar"),
    ):
        with pytest.raises(UnavailableError, match="is not allowed"):
            (open_stream if config.stream else lambda c, r: open_shards(c.shards, c, r))(config, SilentReporter())
    assert not ran.exists()
    with pytest.raises(InputNotFoundError, match=r"none\.tar"):
        open_stream(settings(folder, tmp_path / "none.tar"), SilentReporter())
    with pytest.raises(RecipeError, match="is for training only"):
        open_shards((config := settings(folder)).shards, config, SilentReporter())
    with pytest.raises(ValueError, match="remove weights, filter"):
        settings(folder, weights=[1], filter={"min_side": 3})


@pytest.mark.slow
def test_a_run_over_a_stream_is_trained_continued_and_finished(tmp_path: Path) -> None:
    shards = numbered_shards(tmp_path / "shards", [64, 64])
    data = {"shards": f"pipe:cat {shards}/{{000,001}}.tar", "stream": True, "remote_schemes": ["pipe"]}
    recipe = vae_recipe(shards, data=data | {"val_shards": None}, steps=4, save_every=2, lr_schedule="constant")
    (tmp_path / "r.json").write_text(json.dumps(recipe))
    command = ["train-vae", str(tmp_path / "r.json"), "--out", str(tmp_path / "run"), "--device", "cpu"]
    traced = ["--data-trace", str(tmp_path / "trace")]
    assert ldm_run([*command, *traced]) == 0
    assert ldm_run([*command, *traced, "train.steps=6"]) == 0
    lines = (tmp_path / "trace").read_text().splitlines()
    assert [int(line.partition(" ")[0]) for line in lines] == [step for step in range(1, 7) for _ in range(8)]
    assert {line.split()[1] for line in lines} == {"pipe-0", "pipe-1"}
