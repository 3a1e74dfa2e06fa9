"""Weights, aspect buckets, filters and quarantine: exact shares, nothing lost, the same from any step."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from ldm_cli.data.buckets import bucket_shapes
from ldm_cli.data.config import DataConfig
from ldm_cli.data.interleaving import Interleaving
from ldm_cli.data.loader import Loader
from ldm_cli.data.open_shards import open_shards
from ldm_cli.errors import DataError, InputNotFoundError
from ldm_cli.reporting import SilentReporter
from tests.data.tars import numbered_shards, opened, png, write_tar

NAME = "test"


@pytest.mark.parametrize("weights", [(1.0,), (3.0, 1.0), (0.1, 0.2, 0.7), (1e-4, 1.0), (1.0,) * 30])
@pytest.mark.parametrize("block", [1, 7, 100])
def test_woven_streams_give_each_item_once_in_order_and_exact_shares(weights: tuple[float, ...], block: int) -> None:
    woven = Interleaving(NAME, weights, block)
    items = [woven(place) for place in range(1000)]
    for stream, weight in enumerate(weights):
        own = [number for one, number in items if one == stream]
        assert own == list(range(len(own)))
        assert abs(len(own) - 1000 * weight / sum(weights)) <= block + 1
    assert [Interleaving(NAME, weights, block)(place) for place in (999, 0, 500)] == [items[p] for p in (999, 0, 500)]


def test_a_stream_of_one_item_in_a_million_has_its_turn() -> None:
    woven = Interleaving(NAME, (1.0, 999_999.0), 4096)
    assert 0 in {woven(place)[0] for place in range(1_000_000 - 8192, 1_000_000 + 8192)}


def test_weights_set_the_proportions_and_small_sources_come_round_more_often(tmp_path: Path) -> None:
    for name, size in (("a", 30), ("b", 10)):
        folder = tmp_path / name
        folder.mkdir()
        members = [m for k in range(size) for m in ((f"{k}.png", png()), (f"{k}.txt", name.encode()))]
        write_tar(folder / f"{name}.tar", members)
    config = DataConfig(shards=(str(tmp_path / "a"), str(tmp_path / "b")), weights=(1.0, 3.0), image_size=8)
    shards = open_shards(config.shards, config, SilentReporter())
    loader = Loader(shards, config, seed=0, batch_size=8)
    batches = list(loader.batches(0, 60))
    keys = Counter(key for batch in batches for key in batch.keys)
    share = sum(count for key, count in keys.items() if key.startswith("b/")) / 480
    assert abs(share - 0.75) < 0.05
    b_counts = [count for key, count in keys.items() if key.startswith("b/")]
    assert len(b_counts) == 10
    assert max(b_counts) - min(b_counts) <= 1, "each source has epochs of its own"
    counters = [c for batch in batches for c in zip(batch.epoch.tolist(), batch.position.tolist(), strict=True)]
    assert len(set(counters)) == 480, "no two samples share their random numbers"
    (again,) = Loader(shards, config.model_copy(update={"num_workers": 1}), seed=0, batch_size=8).batches(37, 38)
    assert again.keys == batches[37].keys
    parts = [next(Loader(shards, config, seed=0, batch_size=8, rank=r, world_size=4).batches(37, 38)) for r in range(4)]
    assert [key for part in parts for key in part.keys] == batches[37].keys


def test_weights_must_fit_the_shards_and_their_sources_must_hold_samples(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="weights has 2 numbers, shards has 1"):
        DataConfig(shards="a", weights=(1.0, 2.0))
    folder = numbered_shards(tmp_path / "d", [3, 0])
    names = tuple(str(folder / f"00{k}.tar") for k in (0, 1))
    config = DataConfig(shards=names, weights=(1.0, 1.0))
    shards = open_shards(names, config, SilentReporter())
    with pytest.raises(InputNotFoundError, match=r"001\.tar"):
        Loader(shards, config, seed=0, batch_size=1)


def test_bucket_shapes_keep_area_step_and_aspect() -> None:
    shapes = bucket_shapes(512, 64, 2.0)
    assert (512, 512) in shapes
    assert (384, 640) in shapes
    assert (640, 384) in shapes
    for height, width in shapes:
        assert height % 64 == width % 64 == 0
        assert height * width <= 512**2 < (height + 64) * (width + 64)
        assert max(height, width) <= 2 * min(height, width)


SIZES = [(16, 16), (32, 15), (15, 32), (24, 16), (17, 30)]


def _pictures(folder: Path) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    for shard, count in enumerate((21, 3, 40)):
        members = []
        for k in range(count):
            members += [(f"{k}.png", png((k, shard, 0), SIZES[(k + shard) % 5])), (f"{k}.txt", b"t")]
        write_tar(folder / f"{shard}.tar", members)
    return {"image_size": 24, "label": None, "aspect_buckets": {"step": 8, "max_aspect": 2.0}}


def test_buckets_take_every_sample_once_an_epoch_and_resume_anywhere(tmp_path: Path) -> None:
    shards, config = opened(tmp_path, **_pictures(tmp_path))
    loader = Loader(shards, config, seed=0, batch_size=4)
    batches = list(loader.batches(0, 48))  # three epochs of 64 samples
    keys = Counter(key for batch in batches for key in batch.keys)
    assert len(keys) == 64
    assert set(keys.values()) <= {2, 3, 4}
    assert keys.total() == 192
    shapes = {tuple(batch.images.shape[2:]) for batch in batches}
    assert shapes == {(24, 24), (16, 32), (32, 16)}
    for batch in batches:
        height, width = batch.images.shape[2:]
        for key in batch.keys:
            shard, number = map(int, key.split("/"))
            w, h = SIZES[(number + shard) % 5]
            if w == h:
                assert height == width
            else:
                assert (w > h) == (width > height), "a picture goes to a shape that is its own"
    for start in (1, 16, 31, 47):
        (again,) = Loader(shards, config.model_copy(update={"num_workers": 1}), seed=0, batch_size=4).batches(
            start, start + 1
        )
        assert again.keys == batches[start].keys
        assert torch.equal(again.images, batches[start].images)


def test_all_ranks_have_the_same_shape(tmp_path: Path) -> None:
    shards, config = opened(tmp_path, **_pictures(tmp_path))
    ranks = [Loader(shards, config, seed=0, batch_size=4, rank=r, world_size=2).batches(0, 10) for r in (0, 1)]
    for one, other in zip(*ranks, strict=True):
        assert one.images.shape == other.images.shape


FILTERS: list[tuple[dict[str, Any], set[int]]] = [
    ({"min_side": 16}, {0, 1, 2, 4, 5, 6, 7}),
    ({"max_aspect": 2.0}, {0, 2, 3, 4, 5, 6, 7}),
    ({"min_caption_length": 5}, {0, 1, 2, 3, 5, 6, 7}),
    ({"max_caption_length": 10}, {0, 1, 2, 3, 4, 6, 7}),
    ({"fields": {"score": {"min": 0.5}}}, {0, 1, 2, 3, 7}),
    ({"fields": {"score": {"max": 0.5}}}, {1, 4, 5, 7}),
    ({"fields": {"a.lang": {"any_of": ["en", "de"]}}}, {0, 1, 7}),
    ({"fields": {"score": {}}}, {0, 1, 2, 3, 4, 5, 7}),
    ({"min_side": 16, "fields": {"score": {"min": 0.5}}}, {0, 1, 2, 7}),
]


@pytest.mark.parametrize(("rules", "expected"), FILTERS)
def test_a_filter_leaves_what_meets_all_of_its_rules(
    tmp_path: Path, index_cache: Path, monkeypatch: pytest.MonkeyPatch, rules: dict[str, Any], expected: set[int]
) -> None:
    sizes = [(16, 16), (40, 16), (16, 20), (15, 15), (16, 16), (16, 16), (16, 16), None]
    captions = [b"a caption"] * 4 + [b"abcd", b"a long caption", b"a caption", b"a caption"]
    scores: list[Any] = [0.9, 0.5, 1, 0.6, 0.1, 0.2, "high", 0.5]
    members = []
    for k in range(8):
        facts = {"score": scores[k], "a": {"lang": "en" if k == 0 else "de" if k == 1 else "fr"}}
        if k == 6:
            del facts["score"]
        members += [
            (f"{k}.png", png(size=sizes[k]) if sizes[k] else b"broken"),  # type: ignore[arg-type]
            (f"{k}.txt", captions[k]),
            (f"{k}.json", json.dumps(facts).encode()),
        ]
    write_tar(tmp_path / "a.tar", members)
    shards, _ = opened(tmp_path, filter=rules)
    found = {int(shards.indexes[0].key(k)) for k in range(shards.num_samples)}
    assert found == expected, "what cannot be read stays, to be counted where it is met"
    monkeypatch.setattr("ldm_cli.data.sample_filter._read_facts", None)  # a second reading would fail
    assert opened(tmp_path, filter=rules)[0].fingerprint == shards.fingerprint
    with pytest.raises(TypeError):
        opened(tmp_path, filter={**rules, "max_aspect": 9.0})


def test_a_filter_that_leaves_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match="none of 3 samples remains"):
        opened(numbered_shards(tmp_path / "d", [3]), filter={"min_side": 1000})


def test_quarantined_samples_are_left_out_wherever_the_shards_lie(tmp_path: Path) -> None:
    folder = numbered_shards(tmp_path / "d", [3, 4])
    lines = [
        {"shard": f"/old/place/{s}.tar", "key": k, "reason": "r", "detail": ""}
        for s, k in (("000", "0001"), ("001", "0003"))
    ]
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    whole, (shards, config) = opened(folder)[0], opened(folder, quarantine=str(tmp_path / "bad.jsonl"))
    assert [*shards.sizes] == [2, 3]
    assert shards.fingerprint != whole.fingerprint
    (batch,) = Loader(shards, config, seed=0, batch_size=5).batches(0, 1)
    assert sorted(batch.keys) == ["000/0000", "000/0002", "001/0004", "001/0005", "001/0006"]
    assert batch.captions == [f"caption {int(key[-4:])}" for key in batch.keys]
    with pytest.raises(InputNotFoundError, match=r"none\.jsonl"):
        opened(folder, quarantine=str(tmp_path / "none.jsonl"))


def test_clip_scores_leave_out_captions_that_do_not_fit(tmp_path: Path) -> None:
    folder, file = numbered_shards(tmp_path / "d", [3, 2]), tmp_path / "scores.json"
    pictures = [
        {"name": f"{shard}/{number:04d}", "cosine": cosine}
        for shard, number, cosine in [("000", 0, 0.3), ("000", 1, 0.19), ("001", 3, 0.2), ("001", 4, -0.1)]
    ]
    rule = {"clip_score": {"min": 0.2, "scores": str(file)}}
    with pytest.raises(InputNotFoundError, match=r"scores\.json' not found"):
        opened(folder, filter=rule)
    file.write_text(json.dumps({"pictures": pictures}))
    shards, _ = opened(folder, filter=rule)
    kept = [shards.name(shard, number) for shard, size in enumerate(shards.sizes) for number in range(size)]
    assert kept == ["000/0000", "001/0003"], "0002 has no score"
    stricter = opened(folder, filter={"clip_score": {**rule["clip_score"], "min": 0.25}})[0]
    assert stricter.num_samples == 1
    assert stricter.fingerprint != shards.fingerprint, "other samples make another run"
    file.write_text(json.dumps({"pictures": pictures[:2]}))
    with pytest.raises(DataError, match=r"001\.tar.*val_shards"):
        opened(folder, filter=rule)
    file.write_text(json.dumps({"pictures": [{"name": "000/0000"}]}))
    with pytest.raises(DataError, match="ldm clip score"):
        opened(folder, filter=rule)
