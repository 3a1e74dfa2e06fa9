"""Drawn scenes: pure, complete, within their bounds, with combinations that only `val` has."""

from __future__ import annotations

import json
import resource
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ldm_cli.cli import app
from ldm_cli.data import scene_vocabulary as words
from ldm_cli.data.scene_captions import FULL_FRACTION
from ldm_cli.data.scene_drawing import coverage
from ldm_cli.data.scenes import Split, scene, write_scenes
from ldm_cli.errors import OutputError
from ldm_cli.reporting import SilentReporter

from ..conftest import Ldm


def truths(split: Split, count: int, seed: int = 3) -> list[dict[str, Any]]:
    return [scene(seed, index, split, 32).truth for index in range(count)]


def test_a_scene_is_a_pure_function_of_seed_split_and_index() -> None:
    again = [scene(5, 17, "train", 64) for _ in range(2)]
    assert again[0].image.tobytes() == again[1].image.tobytes()
    assert again[0].truth == again[1].truth
    others = [scene(6, 17, "train", 64), scene(5, 18, "train", 64), scene(5, 17, "val", 64)]
    assert len({other.image.tobytes() for other in [again[0], *others]}) == 4


def test_the_image_size_does_not_change_what_is_drawn() -> None:
    assert scene(5, 17, "train", 32).truth == scene(5, 17, "train", 128).truth


def test_the_same_seed_still_draws_what_it_drew_when_version_2_was_released() -> None:
    first, second = scene(0, 0, "train", 32).truth["objects"]
    assert (first["color"], first["shape"], first["center"], first["radius"]) == (
        "orange",
        "square",
        [0.4283, 0.7403],
        0.1904,
    )
    assert (second["color"], second["shape"], second["size"]) == ("cyan", "ring", "small")


def test_every_word_occurs_and_none_is_rare() -> None:
    sample = truths("train", 1500)
    objects = [thing for truth in sample for thing in truth["objects"]]
    for name, vocabulary in (
        ("shape", words.SHAPE_NAMES),
        ("color", words.COLOR_NAMES),
        ("size", words.SIZE_NAMES),
        ("place", (*words.PLACE_NAMES, None)),
    ):
        counts = Counter(thing[name] for thing in objects)
        assert set(counts) == set(vocabulary)
        assert min(counts.values()) > 0.4 * len(objects) / len(vocabulary)
    for name, options in (("background", words.BACKGROUND_NAMES), ("relation", (*words.RELATION_NAMES, None))):
        assert set(Counter(truth[name] for truth in sample)) == set(options)
    assert (len(words.SHAPES), len(words.COLORS), len(words.PLACES)) == (6, 8, 9)
    assert Counter(truth["num_objects"] for truth in sample)[2] == pytest.approx(0.25 * 1500, rel=0.15)


def test_held_out_pairs_never_occur_in_train_and_in_every_eighth_scene_of_val() -> None:
    def has_held_out(truth: dict[str, Any]) -> bool:
        return any((thing["shape"], thing["color"]) in words.HELD_OUT_PAIRS for thing in truth["objects"])

    train, val = truths("train", 1500), truths("val", 600)
    assert not any(has_held_out(truth) or truth["held_out"] for truth in train)
    assert [has_held_out(truth) for truth in val] == [truth["held_out"] for truth in val] == ([False] * 7 + [True]) * 75
    seen = {(thing["shape"], thing["color"]) for truth in train for thing in truth["objects"]}
    assert len(seen) == 42
    assert {shape for shape, _ in words.HELD_OUT_PAIRS} == set(words.SHAPES)
    assert len({color for _, color in words.HELD_OUT_PAIRS}) == len(words.HELD_OUT_PAIRS)


def test_captions_state_what_they_say_they_state() -> None:
    sample = [scene(4, index, "train", 32) for index in range(600)]
    for drawn in sample:
        truth = drawn.truth
        for name in ("size", "background"):
            values = {thing["size"] for thing in truth["objects"]} if name == "size" else {truth["background"]}
            assert all((f"{value} " in drawn.caption) == (name in truth["stated"]) for value in values)
        for thing in truth["objects"]:
            assert f"{thing['color']} {thing['shape']}" in drawn.caption
            if thing["place"] is not None:
                assert (f"the {thing['place']}" in drawn.caption) == ("place" in truth["stated"])
        if truth["relation"] is not None:
            first, second = (f"{thing['color']} {thing['shape']}" for thing in truth["objects"])
            assert drawn.caption.index(first) < drawn.caption.index(truth["relation"]) < drawn.caption.index(second)
        assert " a orange" not in drawn.caption
        assert not drawn.caption.startswith(" ")
    full = sum(len(drawn.truth["stated"]) == 5 for drawn in sample)
    assert full / len(sample) == pytest.approx(FULL_FRACTION, abs=0.07)
    assert len({drawn.caption for drawn in sample}) > 300


@pytest.mark.parametrize("size", [32, 64])
def test_objects_lie_inside_the_picture_and_their_boxes_are_true(size: int) -> None:
    for index in range(150):
        drawn = scene(9, index, "val", size)
        ground = words.BACKGROUNDS[drawn.truth["background"]]
        inked = drawn.image.point([level != value for value in ground for level in range(256)])
        left, top, right, bottom = inked.convert("L").getbbox() or (0, 0, 0, 0)
        boxes = [thing["box"] for thing in drawn.truth["objects"]]
        expected = [
            min(b[0] for b in boxes),
            min(b[1] for b in boxes),
            max(b[2] for b in boxes),
            max(b[3] for b in boxes),
        ]
        assert min(expected) >= 0
        assert max(expected) <= 1
        assert [left, top, right, bottom] == pytest.approx([size * edge for edge in expected], abs=1.2)


def test_edges_are_anti_aliased_to_the_true_area() -> None:
    for shape, center, radius in (("circle", (0.43, 0.51), 0.2), ("ring", (0.5, 0.37), 0.3)):
        mask, _ = coverage(shape, center, radius, 64)
        hole = 0.55 if shape == "ring" else 0.0
        area = 3.14159 * (1 - hole**2) * (64 * radius) ** 2
        assert sum(mask.tobytes()) / 255 == pytest.approx(area, rel=0.02)
    mask, (left, top) = coverage("square", (0.43, 0.51), 0.2, 64)
    pixels = mask.load()
    assert pixels is not None
    weights = [(x, y, pixels[x, y]) for x in range(mask.width) for y in range(mask.height)]
    total = sum(weight for _, _, weight in weights)
    assert left + 0.5 + sum(x * w for x, _, w in weights) / total == pytest.approx(0.43 * 64, abs=0.1)
    assert top + 0.5 + sum(y * w for _, y, w in weights) / total == pytest.approx(0.51 * 64, abs=0.1)


def test_relations_are_true_and_a_gap_parts_the_two() -> None:
    for truth in truths("train", 400):
        if truth["relation"] is None:
            continue
        first, second = (thing["box"] for thing in truth["objects"])
        gap = {
            "left of": second[0] - first[2],
            "right of": first[0] - second[2],
            "above": second[1] - first[3],
            "below": first[1] - second[3],
        }[truth["relation"]]
        assert gap > 2 / 32


def test_labels_are_repeated_for_single_objects_only() -> None:
    for truth in truths("val", 60):
        for name in ("shape", "color", "size", "place"):
            assert truth[name] == (truth["objects"][0][name] if truth["num_objects"] == 1 else None)


def test_too_small_a_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="size=31"):
        scene(0, 0, "train", 31)


def write(out: Path, **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {"samples": 25, "size": 32, "seed": 1, "val_samples": 6, "shard_samples": 10}
    return write_scenes(out, reporter=SilentReporter(), **(arguments | changes))


def test_shards_hold_png_text_and_truth(tmp_path: Path) -> None:
    record = write(tmp_path / "new" / "scenes")
    out = tmp_path / "new" / "scenes"
    assert record["shards"] == {
        "train-000000.tar": 10,
        "train-000001.tar": 10,
        "train-000002.tar": 5,
        "val-000000.tar": 6,
    }
    assert sorted(path.name for path in out.iterdir()) == ["scenes.json", *record["shards"]]
    with tarfile.open(out / "train-000001.tar") as tar:
        names = tar.getnames()
        assert names[:3] == ["000000010.json", "000000010.png", "000000010.txt"]
        assert len(names) == 30
        contents = [tar.extractfile(name) for name in names[:3]]
        truth, png, text = (content.read() for content in contents if content is not None)
    expected = scene(1, 10, "train", 32)
    assert json.loads(truth) == expected.truth
    assert text.decode() == expected.caption
    assert png.startswith(b"\x89PNG")


def test_the_same_scenes_are_the_same_bytes_and_are_not_written_twice(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "a").iterdir()}
    assert {name: content for name, (content, _) in before.items()} == {
        path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()
    }
    write(tmp_path / "a")
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "a").iterdir()} == before


@pytest.mark.parametrize("num_cores", [1, 3])
def test_the_number_of_cores_changes_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_cores: int) -> None:
    def write(name: str, cores: int) -> dict[str, bytes]:
        monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)))
        write_scenes(tmp_path / name, 20, 32, 5, SilentReporter(), val_samples=4, shard_samples=6)
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    assert write("these", num_cores) == write("two", 2)
    assert len(write("these", num_cores)) == 6


def test_an_interrupted_write_is_finished_by_the_same_call(tmp_path: Path) -> None:
    write(tmp_path / "whole")
    write(tmp_path / "cut")
    marker = tmp_path / "cut" / "scenes.json"
    marker.write_text(marker.read_text().replace('"complete": true', '"complete": false'))
    (tmp_path / "cut" / "val-000000.tar").unlink()
    write(tmp_path / "cut")
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "cut" / path.name).read_bytes() == path.read_bytes()


def test_other_scenes_are_kept_unless_told_otherwise(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(OutputError, match="train-000000"):
        write(tmp_path, seed=2)
    record = write(tmp_path, seed=2, samples=5, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scenes.json", *record["shards"]]


@pytest.mark.parametrize("change", [{"samples": 0}, {"val_samples": 0}, {"shard_samples": 0}, {"size": 16}])
def test_empty_plans_are_refused(tmp_path: Path, change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        write(tmp_path, **change)


@pytest.mark.parametrize("only", ["color=maroon", "color=red", "shape=star"])
def test_every_scene_of_both_splits_has_the_colour_or_shape_that_is_asked_for(only: str, tmp_path: Path) -> None:
    counts = ["--samples", "12", "--val-samples", "9", "--only", only]
    assert app.run(["data", "synth", str(tmp_path), *counts]) == 0
    kind, _, name = only.partition("=")
    facts = []
    for shard in sorted(tmp_path.glob("*.tar")):
        with tarfile.open(shard) as tar:
            facts += [json.load(tar.extractfile(m)) for m in tar if m.name.endswith(".json")]  # type: ignore[arg-type]
    assert [name in [one[kind] for one in fact["objects"]] for fact in facts] == [True] * 21
    assert json.loads((tmp_path / "scenes.json").read_text())["only"] == only


def test_scenes_of_an_unknown_colour_are_refused_with_the_known_ones(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert app.run(["data", "synth", str(tmp_path / "scenes"), "--only", "color=teal"]) == 2
    assert "there are no scenes with 'color=teal': color is one of red," in capfd.readouterr().err
    assert not (tmp_path / "scenes").exists()


def test_a_shard_that_finds_no_room_is_74_and_leaves_nothing_half_written(ldm: Ldm, tmp_path: Path) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    result = ldm("data", "synth", "scenes", "--samples", "100", preexec_fn=limited)
    assert result.returncode == 74, result.stderr
    assert "cannot write 'scenes/train-000000.tar': File too large" in result.stderr
    assert [path.name for path in (tmp_path / "scenes").iterdir()] == ["scenes.json"]
