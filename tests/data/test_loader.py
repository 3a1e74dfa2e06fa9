"""Batches that depend on seed and step alone, and what happens to samples that cannot be used."""

from __future__ import annotations

import gc
import io
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ldm_cli.data.bad_samples import BadSample, BadSampleLog, read_bad_samples
from ldm_cli.data.batch import Batch
from ldm_cli.data.config import DataConfig
from ldm_cli.data.loader import Loader, sequential_batches
from ldm_cli.data.open_shards import open_shards
from ldm_cli.data.prefetch import prefetched
from ldm_cli.errors import DataError, WorkerError
from ldm_cli.reporting import SilentReporter
from tests.data.tars import numbered_sample, numbered_shards, opened, png, write_tar

RANDOM = {"crop": "random", "flip_probability": 0.5, "shuffle_window": 2, "image_size": 8}


def _loader(folder: Path, batch_size: int = 4, seed: int = 0, **options: Any) -> Loader:
    split = {k: options.pop(k) for k in list(options) if k in ("rank", "world_size", "report_bad", "with_images")}
    shards, config = opened(folder, **options)
    return Loader(shards, config, seed=seed, batch_size=batch_size, **split)


def _same(one: Batch, other: Batch) -> bool:
    return (
        torch.equal(one.images, other.images)
        and (one.captions, one.keys, one.metadata) == (other.captions, other.keys, other.metadata)
        and torch.equal(one.epoch, other.epoch)
        and torch.equal(one.position, other.position)
        and one.labels is not None
        and other.labels is not None
        and torch.equal(one.labels, other.labels)
    )


def _children() -> set[int]:
    return {int(child) for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """17 samples in uneven shards, pictures wider than high and all different; one picture is broken."""
    folder = tmp_path / "d"
    folder.mkdir()
    number = 0
    for shard, size in enumerate((7, 1, 4, 5)):
        members = []
        for _ in range(size):
            sample = dict(numbered_sample(number))
            sample[f"{number:04d}.png"] = png((number, 9 * number, 3), (21, 9)) if number != 5 else b"broken"
            members += list(sample.items())
            number += 1
        write_tar(folder / f"{shard:03d}.tar", members)
    return folder


def test_image_caption_label_and_key_are_of_one_sample(tmp_path: Path) -> None:
    for batch in _loader(numbered_shards(tmp_path / "d", [5, 3])).batches(0, 6):
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape == (4, 3, 8, 8)
        assert batch.labels is not None
        numbers = batch.labels.tolist()
        assert batch.captions == [f"caption {n}" for n in numbers]
        assert [key.split("/")[1] for key in batch.keys] == [f"{n:04d}" for n in numbers]
        assert batch.images[:, 0, 0, 0].tolist() == numbers
        assert batch.images[:, 2].unique().tolist() == [77]


def test_every_sample_comes_once_an_epoch_across_batch_borders(tmp_path: Path) -> None:
    seen = Counter[tuple[int, str]]()
    for batch in _loader(numbered_shards(tmp_path / "d", [5, 0, 2]), batch_size=3).batches(0, 7):
        seen.update(zip(batch.epoch.tolist(), batch.keys, strict=True))
    assert len(seen) == 3 * 7
    assert set(seen.values()) == {1}


def test_a_data_set_smaller_than_a_batch_is_repeated(tmp_path: Path) -> None:
    (batch,) = _loader(numbered_shards(tmp_path / "d", [2]), batch_size=5).batches(0, 1)
    assert batch.epoch.tolist() == [0, 0, 1, 1, 2]
    assert len(set(batch.keys)) == 2


@pytest.mark.parametrize("num_workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(folder: Path, num_workers: int) -> None:
    alone = list(_loader(folder, **RANDOM).batches(2, 9))
    assert alone
    together = list(_loader(folder, num_workers=num_workers, **RANDOM).batches(2, 9))
    assert len(together) == len(alone)
    assert all(map(_same, alone, together))


def test_resuming_at_any_step_gives_the_batches_that_would_have_come(folder: Path) -> None:
    whole = list(_loader(folder, **RANDOM).batches(0, 10))
    for start in range(11):
        rest = list(_loader(folder, **RANDOM).batches(start, 10))
        assert len(rest) == 10 - start
        assert all(map(_same, rest, whole[start:]))


def test_ranks_together_take_the_batch_that_one_takes(folder: Path) -> None:
    for step in range(5):
        (alone,) = _loader(folder, **RANDOM).batches(step, step + 1)
        parts = [next(_loader(folder, rank=r, world_size=2, **RANDOM).batches(step, step + 1)) for r in (0, 1)]
        assert torch.equal(torch.cat([part.images for part in parts]), alone.images)
        assert [key for part in parts for key in part.keys] == alone.keys
    with pytest.raises(ValueError, match="world_size=3"):
        _loader(folder, rank=0, world_size=3)


@pytest.mark.parametrize("mixed", [{}, {"weights": [1.0, 1.0]}])
def test_samples_carry_the_loss_weight_of_their_source_also_in_place_of_bad_ones(
    tmp_path: Path, mixed: dict[str, Any]
) -> None:
    numbered_shards(tmp_path / "d", [4, 5, 6])
    broken = [(name, b"" if name.endswith("png") else data) for name, data in numbered_sample(4)]
    write_tar(tmp_path / "d/001.tar", [*broken, *(m for n in range(5, 9) for m in numbered_sample(n))])
    sources = [str(tmp_path / "d/000.tar"), str(tmp_path / "d/00[12].tar")]
    config = DataConfig.from_mapping(
        {"shards": sources, "image_size": 8, "loss_weights": [1, 0.25], "max_bad_fraction": 1, **mixed}
    )
    shards = open_shards(config.shards, config, SilentReporter())
    seen = set()
    for batch in Loader(shards, config, seed=0, batch_size=4).batches(0, 20):
        assert batch.loss_weights is not None
        assert batch.loss_weights.dtype == torch.float32
        for caption, weight in zip(batch.captions, batch.loss_weights.tolist(), strict=True):
            number = int(caption.split()[1])
            assert weight == (1 if number < 4 else 0.25)
            seen.add(number)
    assert seen == {*range(15)} - {4}


def test_loss_weights_need_a_number_for_each_source_and_an_index() -> None:
    with pytest.raises(ValueError, match="loss_weights has 2 numbers, shards has 1"):
        DataConfig.from_mapping({"shards": "a.tar", "loss_weights": [1, 1]})
    with pytest.raises(ValueError, match="stream cannot choose samples: remove loss_weights"):
        DataConfig.from_mapping({"shards": "a.tar", "loss_weights": [2], "stream": True})


def test_seeds_change_order_crops_and_flips(folder: Path) -> None:
    one, other = (next(_loader(folder, batch_size=17, seed=seed, **RANDOM).batches(0, 1)) for seed in (0, 1))
    assert one.keys != other.keys
    assert set(one.keys) != set(other.keys) or not torch.equal(one.images, other.images)


def test_no_global_random_state_is_touched_or_used(folder: Path) -> None:
    torch.manual_seed(1)
    random.seed(1)
    states = torch.get_rng_state(), random.getstate()
    for num_workers in (0, 1):
        list(_loader(folder, num_workers=num_workers, **RANDOM).batches(0, 2))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()


def test_flips_have_the_probability_of_the_recipe(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), (0, 0, 0))
    image.paste((255, 255, 255), (4, 0, 8, 8))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    write_tar(tmp_path / "a.tar", [("a.png", stream.getvalue()), ("a.txt", b"a")])
    for probability, low, high in ((0.0, 0, 0), (0.25, 45, 105), (1.0, 300, 300)):
        loader = _loader(tmp_path, batch_size=300, label=None, flip_probability=probability)
        (batch,) = loader.batches(0, 1)
        assert low <= int((batch.images[:, 0, 0, 0] > 128).sum()) <= high


def test_one_of_several_captions_is_drawn_anew_each_epoch(tmp_path: Path) -> None:
    texts = ["one", "two", "three"]
    write_tar(tmp_path / "a.tar", [("a.png", png()), ("a.json", json.dumps({"texts": texts}).encode())])
    loader = _loader(tmp_path, batch_size=300, caption="json:texts", label=None)
    (batch,) = loader.batches(0, 1)
    assert all(70 < batch.captions.count(text) < 130 for text in texts)


def test_parts_not_wanted_are_not_read(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.png", b"broken"), ("a.txt", b"a")])
    (batch,) = _loader(tmp_path, batch_size=2, label=None, with_images=False).batches(0, 1)
    assert batch.captions == ["a", "a"]
    assert batch.images.shape == (2, 0, 0, 0)
    write_tar(tmp_path / "a.tar", [("b.png", png())])
    shards, config = opened(tmp_path, label=None)
    (batch,) = Loader(shards, config, seed=0, batch_size=2, with_captions=False).batches(0, 1)
    assert batch.captions == ["", ""]
    assert batch.labels is None


BAD = {
    "missing image": [("x.txt", b"t"), ("x.cls", b"0")],
    "empty image": [("x.png", b""), ("x.txt", b"t"), ("x.cls", b"0")],
    "not an image": [("x.png", b"<html>"), ("x.txt", b"t"), ("x.cls", b"0")],
    "damaged image": [("x.png", png()[:-30]), ("x.txt", b"t"), ("x.cls", b"0")],
    "too many pixels": [("x.png", png(size=(101, 100))), ("x.txt", b"t"), ("x.cls", b"0")],
    "member too large": [("x.png", bytes(5001)), ("x.txt", b"t"), ("x.cls", b"0")],
    "missing caption": [("x.png", png()), ("x.cls", b"0")],
    "blank caption": [("x.png", png()), ("x.txt", b" \n\0"), ("x.cls", b"0")],
    "missing label": [("x.png", png()), ("x.txt", b"t")],
    "bad label": [("x.png", png()), ("x.txt", b"t"), ("x.cls", b"cat")],
    "duplicate members": [("x.png", png()), ("x.txt", b"t"), ("x.txt", b"u"), ("x.cls", b"0")],
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_sample_is_replaced_counted_and_named(tmp_path: Path, reason: str) -> None:
    good = [member for number in range(6) for member in numbered_sample(number)]
    path = write_tar(tmp_path / "a.tar", [*good, *BAD[reason]])
    reported: list[BadSample] = []
    limits = {"max_pixels": 10_000, "max_member_bytes": 5000}
    loader = _loader(tmp_path, batch_size=7, report_bad=reported.append, **limits)
    batches = list(loader.batches(0, 2))
    assert [len(batch) for batch in batches] == [7, 7]
    assert all("x" not in key for batch in batches for key in batch.keys)
    assert {(bad.shard, bad.key, bad.reason) for bad in reported} == {(str(path), "x", reason)}
    assert loader.account.reasons == {reason: len(reported)}
    assert len(reported) >= 2
    shards, config = opened(tmp_path, **limits)
    names = [key for batch in sequential_batches(shards, config, 4) for key in batch.keys]
    assert names == [f"a/{number:04d}" for number in range(6)]


def test_replacements_are_the_same_whatever_the_workers_and_the_start(folder: Path) -> None:
    whole = list(_loader(folder).batches(0, 9))
    epochs = {e for batch in whole for e in batch.epoch.tolist()}
    assert len(epochs) > 1, "the broken sample is met more than once"
    assert all(map(_same, _loader(folder, num_workers=2).batches(4, 9), whole[4:]))


def test_empty_captions_are_kept_if_the_recipe_says_so_and_counted(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar",
        [("a.png", png()), ("b.png", png()), ("b.txt", b" "), ("c.png", png()), ("c.txt", b"caf\xe9")],
    )
    loader = _loader(tmp_path, batch_size=3, label=None, missing_caption="empty")
    (batch,) = loader.batches(0, 1)
    assert sorted(batch.captions) == ["", "", "café"]
    assert loader.remarks == {"empty caption": 2, "Windows-1252 text": 1}


def test_too_many_bad_samples_stop_the_run(tmp_path: Path) -> None:
    members = [m for n in range(50) for m in numbered_sample(n) if n % 5 or not m[0].endswith("png")]
    write_tar(tmp_path / "a.tar", members)
    for num_workers in (0, 1):
        with pytest.raises(DataError, match=r"too many bad samples.*11 × missing image\): no member \."):
            list(_loader(tmp_path, batch_size=1, num_workers=num_workers).batches(0, 500))
    shards, config = opened(tmp_path, max_bad_fraction=0.5)
    assert sum(map(len, sequential_batches(shards, config, 8))) == 40


def test_a_data_set_without_one_good_sample_ends_and_says_why(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.txt", b"a")])
    for num_workers in (0, 1):
        with pytest.raises(DataError, match="missing image"):
            list(_loader(tmp_path, label=None, max_bad_fraction=1.0, num_workers=num_workers).batches(0, 1))


def test_a_shard_that_changes_during_the_run_stops_it(tmp_path: Path) -> None:
    for num_workers in (0, 1):
        folder = numbered_shards(tmp_path / f"{num_workers}", [40])
        loader = _loader(folder, num_workers=num_workers)
        write_tar(folder / "000.tar", [("a.txt", b"other")])
        with pytest.raises(DataError, match="changed"):
            list(loader.batches(0, 3))


def test_sequential_batches_are_in_order_centred_and_limited(folder: Path) -> None:
    shards, config = opened(folder, **RANDOM)
    batches = list(sequential_batches(shards, config, 5, with_json=True))
    assert [len(batch) for batch in batches] == [5, 5, 5, 1]
    numbers = [m["number"] for batch in batches for m in batch.metadata or []]
    assert numbers == [n for n in range(17) if n != 5]
    assert torch.cat([batch.position for batch in batches]).tolist() == list(range(16))
    again = list(sequential_batches(shards, config, 16))
    assert torch.equal(again[0].images, torch.cat([batch.images for batch in batches]))
    for limit, lengths in ((0, []), (3, [3]), (5, [5]), (7, [5, 2]), (16, [5, 5, 5, 1]), (99, [5, 5, 5, 1])):
        assert [len(batch) for batch in sequential_batches(shards, config, 5, limit)] == lengths


def test_closing_early_leaves_no_thread_no_process_and_no_open_file(folder: Path) -> None:
    gc.collect()
    before = _open_files(), threading.active_count(), _children()
    for num_workers in (0, 1):
        loader = _loader(folder, num_workers=num_workers)
        batches = loader.batches(0, 1000)
        next(batches)
        batches.close()
        del loader, batches
    shards, config = opened(folder)
    stream = sequential_batches(shards, config, 2)
    next(stream)
    stream.close()
    gc.collect()
    assert (_open_files(), threading.active_count(), _children()) == before


def test_workers_ignore_the_signals_of_a_batch_queue(folder: Path) -> None:
    before = _children()
    batches = _loader(folder, num_workers=2).batches(0, 40)
    first = next(batches)
    for child in _children() - before:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            os.kill(child, number)
    assert len([first, *batches]) == 40


def test_a_worker_that_is_killed_is_an_error_and_no_hang(folder: Path) -> None:
    before = _children()
    batches = _loader(folder, num_workers=1).batches(0, 10_000)
    next(batches)
    for child in _children() - before:
        os.kill(child, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(WorkerError, match="killed by SIGKILL"):
        list(batches)
    assert time.monotonic() - start < 30


def test_the_log_and_the_counts_are_those_of_an_uninterrupted_run(folder: Path, tmp_path: Path) -> None:
    whole = _loader(folder, report_bad=BadSampleLog(tmp_path / "whole.jsonl"))
    list(whole.batches(0, 15))
    assert whole.account.reasons["not an image"] >= 3
    assert whole.account.num_read == 60 + whole.account.reasons.total()
    path = tmp_path / "lives.jsonl"
    for start, end in ((0, 5), (3, 9), (9, 9), (8, 15)):  # a life went on beyond its last checkpoint
        life = _loader(folder, num_workers=start % 2, report_bad=BadSampleLog(path))
        list(life.batches(start, end))
        with path.open("ab") as file:
            file.write(b'{"shard": "cut by a ki')
    assert (life.account.num_read, life.account.reasons) == (whole.account.num_read, whole.account.reasons)
    ours, theirs = read_bad_samples(path), read_bad_samples(tmp_path / "whole.jsonl")
    assert ours == theirs
    assert {(bad.shard, bad.key) for bad in ours} == {(str(folder / "000.tar"), "0005")}


def test_ranks_write_one_log_and_each_counts_its_own_part(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    for steps in ((0, 4), (4, 12)):
        ranks = [_loader(folder, rank=r, world_size=2, report_bad=BadSampleLog(path)) for r in (0, 1)]
        for rank in ranks:
            list(rank.batches(*steps))
    alone = _loader(folder, report_bad=BadSampleLog(path))
    list(alone.batches(0, 12))
    assert sum((rank.account.reasons for rank in ranks), Counter()) == alone.account.reasons
    assert len(read_bad_samples(path)) == alone.account.reasons.total()
    later = _loader(folder, report_bad=BadSampleLog(path))  # two ranks before, one now
    list(later.batches(11, 12))
    assert later.account.reasons == alone.account.reasons


def test_the_trace_has_step_shard_and_key_of_each_sample(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("d/x y.png", png()), ("d/x y.txt", b"t")])
    (batch,) = _loader(tmp_path, batch_size=2, label=None).batches(7, 8)
    assert list(batch.trace(7)) == ["7 a d/x y"] * 2


def test_prefetching_keeps_order_stays_bounded_and_passes_errors_on() -> None:
    made: list[int] = []

    def source() -> Generator[int]:
        for number in range(5):
            made.append(number)
            yield number
        raise KeyError("end")

    with prefetched(source()) as items:
        assert next(items) == 0
        time.sleep(0.1)
        assert len(made) <= 4  # one taken, two waiting, one in the producer's hands
        received = [0]
        with pytest.raises(KeyError, match="end"):
            received.extend(items)
    assert made == [0, 1, 2, 3, 4]
