"""The features of a set of pictures: what is kept of them."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_cli.errors import DataError
from ldm_cli.evaluation.picture_metrics import CLIP, PictureFeatures, frechet_of, measure_pictures

WIDTH = 32


def batch(seed: int, count: int = 50) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(count, WIDTH, generator=generator) for name in ("2048", CLIP)}


def filled(metrics: Any, num_batches: int, first: int = 0) -> PictureFeatures:
    features = PictureFeatures(metrics, torch.device("cpu"))
    for seed in range(first, first + num_batches):
        features.add(batch(seed))
    return features


def tensor_bytes() -> int:
    gc.collect()
    return sum(one.nbytes for one in gc.get_objects() if isinstance(one, Tensor))


@pytest.mark.parametrize(("metrics", "per_picture"), [({"fid", "frechet_distance"}, 0), ({"fid", "kid"}, 4 * WIDTH)])
def test_distances_take_the_same_memory_for_any_number_of_pictures(
    metrics: Any, per_picture: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm_cli.evaluation.frechet._CHUNK", 100)
    found = []
    for num_batches in (10, 100):
        before = tensor_bytes()
        features = filled(metrics, num_batches)
        found.append(tensor_bytes() - before)
        assert features.count == 50 * num_batches
        del features
    assert found[1] - found[0] == per_picture * 50 * (100 - 10)


def test_a_distance_of_fewer_pictures_than_features_says_so() -> None:
    messages: list[str] = []
    few, many = filled({"fid", "frechet_distance"}, 1), filled({"fid", "frechet_distance"}, 4, first=7)
    measure_pictures(("fid",), many, many, messages.append)
    assert messages == []
    small = PictureFeatures({"fid", "frechet_distance"}, torch.device("cpu"))
    small.add({name: values[:30] for name, values in batch(3).items()})
    measure_pictures(("fid",), small, many, messages.append)
    frechet_of(CLIP, "fd[1a2b3c4d]", many, small, messages.append)
    assert messages == [
        "fid: 30 generated pictures for 32 features; compare only with distances of as many pictures",
        "fd[1a2b3c4d]: 30 real pictures for 32 features; compare only with distances of as many pictures",
    ]
    assert measure_pictures(("fid",), few, many, messages.append)["fid"]["fid_interval"] is not None


def test_one_picture_has_no_distance() -> None:
    one = PictureFeatures({"fid", "frechet_distance"}, torch.device("cpu"))
    one.add(batch(0, 1))
    with pytest.raises(DataError, match="fid cannot be measured: 1 generated pictures, but at least 2 are needed"):
        measure_pictures(("fid",), one, filled({"fid"}, 1), lambda message: None)
    with pytest.raises(DataError, match=r"fd\[x\] cannot be measured: 1 generated pictures"):
        frechet_of(CLIP, "fd[x]", one, filled({"frechet_distance"}, 1), lambda message: None)
