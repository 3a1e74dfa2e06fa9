"""`ldm clip dedup` on embeddings whose near ones are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm_cli.errors import DataError, DivergedError, OutputError
from ldm_cli.formats.embedding_files import write_embeddings
from ldm_cli.reporting import SilentReporter
from ldm_cli.stages import clip_dedup

CLIP = {"clip": {"model": "m", "sha256": "1"}}


def embedded(file: Path, angles: list[float], shard: str, about: dict[str, object] = CLIP) -> Path:
    """Vectors of a plane at these angles in degrees, and names."""
    radians = torch.deg2rad(torch.tensor(angles))
    vectors: Tensor = torch.stack((radians.cos(), radians.sin()), 1)
    rows = [{"source": "data", "name": f"{shard}/{number}"} for number in range(len(angles))]
    write_embeddings(file, vectors, rows, about, overwrite=False)
    return file


def test_pictures_near_to_kept_ones_and_to_the_other_set_are_left_out(tmp_path: Path) -> None:
    own = embedded(tmp_path / "own.npy", [0, 5, 40, 44, 48, 80], "train-000000")
    other = embedded(tmp_path / "other.safetensors", [82, 170], "val-000000")
    threshold = float(torch.deg2rad(torch.tensor(6.0)).cos())
    alone = clip_dedup.run(own, None, threshold, tmp_path / "a.jsonl", SilentReporter())
    assert (alone["samples"], alone["pairs"], alone["left_out"], alone["shared"]) == (6, 3, 2, 0)
    assert alone["clip"] == CLIP["clip"]
    both = clip_dedup.run(own, other, threshold, tmp_path / "b.jsonl", SilentReporter())
    assert (both["samples"], both["pairs"], both["shared_pairs"], both["shared"]) == (6, 3, 1, 1)
    lines = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert [(line["shard"], line["key"]) for line in lines] == [("train-000000.tar", key) for key in "135"]
    assert lines[-1]["detail"].startswith("like val-000000/0, cosine 0.999")
    with pytest.raises(OutputError, match="--overwrite"):
        clip_dedup.run(own, None, threshold, tmp_path / "a.jsonl", SilentReporter())


def test_embeddings_of_two_models_are_not_compared(tmp_path: Path) -> None:
    own = embedded(tmp_path / "own.npy", [0, 5], "a")
    other = embedded(tmp_path / "other.npy", [0, 5], "b", {"clip": {"model": "m", "sha256": "2"}})
    with pytest.raises(DataError, match="different models"):
        clip_dedup.run(own, other, 0.9, tmp_path / "out.jsonl", SilentReporter())


def test_embeddings_without_names_are_refused(tmp_path: Path) -> None:
    own = embedded(tmp_path / "own.npy", [0, 1], "a")
    own.with_suffix(".names.jsonl").unlink()
    with pytest.raises(DataError, match="does not name its pictures"):
        clip_dedup.run(own, None, 0.9, tmp_path / "out.jsonl", SilentReporter())


def test_embeddings_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    own = embedded(tmp_path / "own.npy", [0, 1, float("nan")], "a")
    with pytest.raises(DivergedError, match="row 2 of the vectors is not finite"):
        clip_dedup.run(own, None, 0.9, tmp_path / "out.jsonl", SilentReporter())


def test_pictures_of_a_folder_are_listed_by_their_paths(tmp_path: Path) -> None:
    rows = [{"source": "photos", "name": name} for name in ("a.png", "in/b.c.png")]
    write_embeddings(tmp_path / "own.npy", torch.ones(2, 3), rows, CLIP, overwrite=False)
    clip_dedup.run(tmp_path / "own.npy", None, 0.9, tmp_path / "out.jsonl", SilentReporter())
    line = json.loads((tmp_path / "out.jsonl").read_text())
    assert (line["shard"], line["key"]) == ("", "in/b.c.png")
