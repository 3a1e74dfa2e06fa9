"""A model of ours, each of whose files is damaged in turn: whoever opens it refuses, and says which file it is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ldm_cli.errors import CheckpointError, InputNotFoundError, LdmError
from ldm_cli.families.codec_folder import open_codec
from ldm_cli.families.open_family import open_family, resolve_model
from ldm_cli.formats.model_source import load_tensors
from ldm_cli.training.checkpoint import commit_folder
from tests.sampling.tiny import tiny_pipeline


@pytest.fixture
def model(tmp_path: Path) -> Path:
    commit_folder(tmp_path / "model", tiny_pipeline().family.save)
    return tmp_path / "model"


def _flipped(place: float) -> Callable[[Path], object]:
    def flip(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[int(place * (len(data) - 1))] ^= 16
        file.write_bytes(data)

    return flip


def _fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _other_link(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(file.read_bytes() + b" ")
    file.unlink()
    file.symlink_to(other)


DAMAGES: dict[str, Callable[[Path], object]] = {
    **{f"flipped at {place}": _flipped(place) for place in (0.0, 0.5, 0.97, 1.0)},
    "cut": lambda file: os.truncate(file, file.stat().st_size - 1),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\n"),
    "missing": lambda file: file.unlink(),
    "a FIFO": _fifo,
    "a link": _other_link,
}
MORE = ("flipped at 0.5", "flipped at 1.0", "zeros", "longer")


@pytest.mark.parametrize(
    "damage",
    [pytest.param(name, marks=pytest.mark.exhaustive if name in MORE else ()) for name in DAMAGES],
)
def test_every_damaged_file_of_a_model_is_refused(damage: str, model: Path) -> None:
    open_family(model)
    files = [file for file in sorted(model.rglob("*")) if file.is_file() and file.name != "manifest.json"]
    assert len(files) >= 10
    for file in files:
        content = file.read_bytes()
        DAMAGES[damage](file)
        with pytest.raises((CheckpointError, InputNotFoundError)) as caught:
            open_family(model)
        if not file.name.startswith(("tokenizer", "vocab", "merges", "special")):
            assert file.name in str(caught.value) or str(file.parent) in str(caught.value)
        file.unlink(missing_ok=True)
        file.write_bytes(content)
    open_family(model)


@pytest.mark.parametrize("damage", ["flipped at 0.97", "zeros"])
def test_a_part_by_itself_is_refused_as_well(damage: str, model: Path) -> None:
    (file,) = (model / "vae").glob("*.safetensors")
    DAMAGES[damage](file)
    for read in (open_codec, load_tensors, lambda folder: open_codec(resolve_model(folder))):
        with pytest.raises(LdmError, match="damaged"):
            read(model / "vae")


def test_a_folder_that_was_changed_on_purpose_is_read_without_its_manifest(model: Path) -> None:
    index = model / "model_index.json"
    index.write_text(index.read_text() + "\n")
    with pytest.raises(CheckpointError, match=r"delete manifest\.json if you changed the folder"):
        open_family(model)
    (model / "manifest.json").unlink()
    open_family(model)
