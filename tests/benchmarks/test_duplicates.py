"""The study of duplicates, on a few scenes."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.duplicates import KINDS, growth, is_alike, measured, plant
from ldm_cli.data.near_pairs import Pairs
from ldm_cli.data.scenes import scene


def test_copies_are_planted_and_counted_by_kind(tmp_path: Path) -> None:
    truths = plant(tmp_path, 12, 4)
    assert [truth["kind"] for truth in truths[12:]] == [*KINDS]
    assert all(is_alike(truth, truths[truth["of"]]) for truth in truths[12:])
    rows = torch.tensor([truths[12]["of"], truths[13]["of"], 12])
    stranger = next(n for n in range(12) if not is_alike(truths[n], truths[12]))
    rows[2] = stranger
    found = measured(Pairs(rows, torch.tensor([12, 13, 12]), torch.ones(3), 1.0), truths)
    assert (found[KINDS[0]]["recall"], found[KINDS[0]]["precision"]) == (1.0, 0.5)
    assert (found[KINDS[1]]["precision"], found[KINDS[2]]["recall"]) == (1.0, 0.0)


def test_a_scene_is_alike_its_mirror_image_and_unlike_one_of_another_colour() -> None:
    truth = next(t for n in range(20) if (t := scene(0, n, "train", 32).truth)["num_objects"] == 1)
    (one,) = truth["objects"]
    x, y = one["center"]
    assert is_alike(truth, {**truth, "objects": [{**one, "center": [1 - x, y]}]})
    assert not is_alike(truth, {**truth, "objects": [{**one, "center": [x, y + 0.1]}]})
    assert not is_alike(truth, {**truth, "objects": [{**one, "color": "none"}]})


def test_the_search_is_timed_and_finds_the_copies() -> None:
    row = growth(1000)
    assert (row["vectors"], row["copies"], row["pairs"]) == (1000, 10, 10)
