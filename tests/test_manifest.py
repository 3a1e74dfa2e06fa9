"""Manifests: whoever reads a file of a folder with one notices every change."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ldm_cli import manifest
from ldm_cli.errors import CheckpointError
from ldm_cli.manifest import expect_listed, known_sha256, read_listed
from ldm_cli.storage import file_sha256
from ldm_cli.training.checkpoint import commit_folder


def write(folder: Path) -> None:
    (folder / "unet").mkdir()
    (folder / "unet" / "config.json").write_text("{}")
    (folder / "unet" / "weights").write_bytes(bytes(range(256)) * 2**13)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(manifest, "_SECONDS_OF_REST", 0)
    commit_folder(tmp_path / "model", write)
    return tmp_path / "model"


def flip(file: Path, place: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def read_both(model: Path) -> None:
    read_listed(model / "unet" / "config.json")
    expect_listed(model / "unet" / "weights")


def test_a_folder_as_it_was_written_is_read(model: Path, tmp_path: Path) -> None:
    read_both(model)
    (tmp_path / "link").symlink_to(model)
    read_both(tmp_path / "link")
    assert read_listed(model / "unet" / ".." / "unet" / "config.json") == b"{}"


CHANGES: dict[str, Callable[[Path], object]] = {
    "first byte": lambda model: flip(model / "unet" / "weights"),
    "last byte": lambda model: flip(model / "unet" / "weights", -1),
    "cut": lambda model: os.truncate(model / "unet" / "weights", 2**20),
    "zeros": lambda model: (model / "unet" / "weights").write_bytes(bytes(2**21)),
    "emptied": lambda model: (model / "unet" / "config.json").write_bytes(b""),
    "a file is missing": lambda model: (model / "unet" / "weights").unlink(),
    "manifest emptied": lambda model: (model / "manifest.json").write_bytes(b""),
    "manifest of zeros": lambda model: (model / "manifest.json").write_bytes(bytes(500)),
    "manifest without files": lambda model: (model / "manifest.json").write_text('{"versions": {}, "files": {}}'),
    "manifest of another type": lambda model: (model / "manifest.json").write_text('{"files": {"a": 1}}'),
    "manifest leads outside": lambda model: (model / "manifest.json").write_text('{"files": {"../a": {}}}'),
    "file not named": lambda model: (model / "manifest.json").write_text(
        (model / "manifest.json").read_text().replace("unet/config", "unet/confih")
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_noticed(change: str, model: Path) -> None:
    read_both(model)
    CHANGES[change](model)
    with pytest.raises(CheckpointError, match="damaged"):
        read_both(model)


def test_a_change_that_keeps_size_and_time_is_noticed(model: Path) -> None:
    file = model / "unet" / "weights"
    expect_listed(file)
    before = file.stat()
    flip(file, 1000)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CheckpointError):
        expect_listed(file)


def test_a_component_that_is_a_link_to_elsewhere_is_noticed(model: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"a": 1}')
    (model / "unet").rename(tmp_path / "unet")
    (model / "unet").symlink_to(tmp_path / "other")
    with pytest.raises(CheckpointError):
        read_listed(model / "unet" / "config.json")


def test_manifests_of_other_programs_and_folders_without_one_mean_nothing(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"name": "a web page", "icons": []}))
    (tmp_path / "config.json").write_text("{}")
    assert read_listed(tmp_path / "config.json") == b"{}"
    expect_listed(tmp_path / "config.json")


def test_a_file_is_hashed_once_for_each_of_its_states(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []
    monkeypatch.setattr(manifest, "file_sha256", lambda path: hashed.append(path) or file_sha256(path))
    file = model / "unet" / "weights"
    for _ in range(3):
        expect_listed(file)
    assert len(hashed) == 1
    known_sha256(file, again=True)
    assert len(hashed) == 2


def test_a_damaged_cache_of_digests_is_as_none(model: Path, tmp_path: Path) -> None:
    file = model / "unet" / "weights"
    right = known_sha256(file)
    (note,) = (tmp_path / "cache" / "ldm" / "digests").iterdir()
    for damage in (b"", b"\xff" * 200, note.read_bytes().replace(right.encode(), b"0" * 64), bytes(2**20)):
        note.write_bytes(damage)
        assert known_sha256(file) == right
        expect_listed(file)
