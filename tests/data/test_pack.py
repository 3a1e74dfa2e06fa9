"""Packing, read back by webdataset itself; and the reports on shards."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ldm_cli.cli.app import run as ldm
from ldm_cli.data.config import DataConfig
from ldm_cli.data.pack import pack
from ldm_cli.data.sources import Choices
from ldm_cli.errors import DataError, InputNotFoundError, OutputError
from ldm_cli.reporting import SilentReporter
from ldm_cli.stages import data as stage
from tests.data.tars import numbered_sample, numbered_shards, png, write_tar

IMAGES = {"b/two.PNG": (9, 5), "a.jpg": (8, 8), "c.webp": (3, 4)}
CAPTIONS = {"b/two.PNG": "zwei, 二", "a.jpg": "one", "c.webp": "three"}


def _image(name: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", IMAGES[name], (9, 9, 9)).save(stream, {"PNG": "PNG", "jpg": "JPEG"}.get(name[-3:], "WEBP"))
    return stream.getvalue()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for name in IMAGES:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_image(name))
    return folder


def _packed(source: Path, out: Path, **options: Any) -> dict[str, Any]:
    return pack(source, out, SilentReporter(), **options)


def _read_back(out: Path) -> list[dict[str, Any]]:
    """All samples of all shards, as webdataset gives them."""
    import webdataset

    shards = [str(path) for path in sorted(out.glob("*.tar"))]
    return list(webdataset.WebDataset(shards, shardshuffle=False, handler=webdataset.reraise_exception))


def _check_content(out: Path) -> None:
    samples = _read_back(out)
    assert [sample["__key__"] for sample in samples] == ["000000000", "000000001", "000000002"]
    facts = [json.loads(sample["json"]) for sample in samples]
    assert sorted(fact["path"] for fact in facts) == sorted(IMAGES)
    for sample, fact in zip(samples, facts, strict=True):
        name = fact["path"]
        assert sample[Path(name).suffix.lower()[1:]] == _image(name)
        assert sample["txt"].decode() == CAPTIONS[name]
        assert (fact["width"], fact["height"]) == IMAGES[name]


def test_a_folder_with_captions_beside_its_images(images: Path, tmp_path: Path) -> None:
    for name, suffix in zip(IMAGES, (".txt", ".caption", ".txt"), strict=True):
        (images / name).with_suffix(suffix).write_text(CAPTIONS[name] + "\n", "utf-8")
    result = _packed(images, tmp_path / "out", shard_samples=2)
    assert result["shards"] == {"train-000000.tar": 2, "train-000001.tar": 1}
    assert result["without_caption"] == 0
    _check_content(tmp_path / "out")


def test_an_imagefolder_keeps_what_else_its_metadata_say(images: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"file_name": n, "text": CAPTIONS[n], "stars": 5}, ensure_ascii=False) for n in IMAGES]
    (images / "metadata.jsonl").write_text("\n".join(lines) + "\n\n", "utf-8")
    assert _packed(images, tmp_path / "out")["samples"] == 3
    _check_content(tmp_path / "out")
    assert all(json.loads(sample["json"])["stars"] == 5 for sample in _read_back(tmp_path / "out"))


@pytest.mark.parametrize("columns", [("path", "caption"), ("file_name", "text"), ("bild", "satz")])
def test_a_csv_with_columns_of_any_name(images: Path, tmp_path: Path, columns: tuple[str, str]) -> None:
    with (images / "list.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("", *columns), *((k, n, CAPTIONS[n]) for k, n in enumerate(IMAGES))])
    choices = Choices(*columns) if columns[0] == "bild" else Choices()
    _packed(images / "list.csv", tmp_path / "out", choices=choices)
    _check_content(tmp_path / "out")


def test_the_same_source_gives_the_same_bytes(images: Path, tmp_path: Path) -> None:
    for out in ("one", "two"):
        _packed(images, tmp_path / out)
    one, two = ((tmp_path / out / "train-000000.tar").read_bytes() for out in ("one", "two"))
    assert one == two


def test_bad_images_are_left_out_and_named_and_captions_may_be_missing(images: Path, tmp_path: Path) -> None:
    (images / "bad.png").write_bytes(png(size=(64, 64))[:-40])
    (images / "page.jpg").write_bytes(b"<html>")
    result = _packed(images, tmp_path / "out")
    assert result["samples"] == 3
    assert result["without_caption"] == 3
    assert result["bad"] == {"damaged image": 1, "not an image": 1}
    assert [entry.split(":")[0] for entry in result["bad_files"]] == ["bad.png", "page.jpg"]


def test_existing_output_is_refused_and_failure_leaves_nothing(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (images / "list.csv").write_text("path,caption\na.jpg,one\nc.webp\n")
    with pytest.raises(DataError, match=r"list\.csv:3: it has not"):
        _packed(images / "list.csv", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]
    out.mkdir()
    (images / "list.csv").unlink()
    _packed(images, out)
    before = (out / "train-000000.tar").read_bytes()
    for taken in (out, images / "a.jpg"):
        with pytest.raises(OutputError, match="exists already"):
            _packed(images, taken)
    assert (out / "train-000000.tar").read_bytes() == before


def test_a_folder_takes_several_prefixes_and_overwrites_one_when_asked_to(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _packed(images, out, shard_samples=1)
    _packed(images, out, prefix="cats-")
    (out / "notes.txt").write_text("mine")
    before = (out / "cats-000000.tar").read_bytes()
    with pytest.raises(OutputError, match=r"train-000000\.tar exists already; add --overwrite, or choose another"):
        _packed(images, out)
    _packed(images, out, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == ["cats-000000.tar", "notes.txt", "train-000000.tar"]
    assert (out / "cats-000000.tar").read_bytes() == before


def _split(folder: Path, out: Path, **options: Any) -> tuple[set[str], set[str]]:
    """The paths of the pictures for training, and of those that are held out."""
    result = _packed(folder, out, val_fraction=0.3, shard_samples=8, **options)
    paths = {split: set[str]() for split in ("train", "val")}
    for sample in _read_back(out):
        paths[Path(sample["__url__"]).name.partition("-")[0]].add(json.loads(sample["json"])["path"])
    assert (result["samples"], result["val_samples"]) == (len(paths["train"]), len(paths["val"]))
    assert sum(result["shards"].values()) == len(paths["train"] | paths["val"])
    return paths["train"], paths["val"]


def test_held_out_pictures_stay_held_out_when_others_come(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:03d}.png").write_bytes(png())
    train, held_out = _split(folder, tmp_path / "first")
    assert 4 <= len(held_out) <= 20
    assert not train & held_out
    for number in range(40):
        (folder / f"{number:03d}b.png").write_bytes(png())
    grown, grown_out = _split(folder, tmp_path / "second")
    assert grown > train
    assert grown_out > held_out


def test_a_split_without_one_side_is_warned_about(images: Path, tmp_path: Path) -> None:
    reporter = SilentReporter()
    pack(images, tmp_path / "out", reporter, val_fraction=1e-9)
    assert reporter.messages == ["warning: 3 samples for training and 0 held out: change --val-fraction"]


def test_class_folders_give_number_name_and_caption(images: Path, tmp_path: Path) -> None:
    for name, kind in (("a.jpg", "cat"), ("c.webp", "dog"), ("b/two.PNG", "cat")):
        (images / kind).mkdir(exist_ok=True)
        (images / name).rename(images / kind / Path(name).name)
    (images / "b").rmdir()
    assert _packed(images, tmp_path / "out")["classes"] == {"cat": 0, "dog": 1}
    facts = [(sample["cls"], json.loads(sample["json"])["class"]) for sample in _read_back(tmp_path / "out")]
    assert facts == [(b"0", "cat"), (b"0", "cat"), (b"1", "dog")]


@pytest.mark.parametrize(
    ("out", "folder"), [(".", "here"), ("../link", "empty"), ("../dangling", "new/folder"), ("../left", "left")]
)
def test_the_output_folder_may_be_the_current_one_a_link_or_what_a_killed_run_left(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, folder: str
) -> None:
    for name in ("here", "empty", "left/.tmp-pack"):
        (tmp_path / name).mkdir(parents=True)
    for name, target in (("link", "empty"), ("dangling", "new/folder")):
        (tmp_path / name).symlink_to(target)
    monkeypatch.chdir(tmp_path / "here")
    _packed(images, Path(out), shard_samples=2)
    for place in (Path(out), tmp_path / folder):
        assert sorted(path.name for path in place.iterdir()) == ["train-000000.tar", "train-000001.tar"]
    with pytest.raises(OutputError, match="exists already"):
        _packed(images, Path(out))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "bild,caption\na.jpg,one\n", "no column of pictures .*'bild', 'caption'"),
        ("a.csv", "path,satz\na.jpg,one\n", "no column of captions .*'path', 'satz'"),
        ("a.csv", b"path,caption\na.jpg,\x81\xf5\n", r"a\.csv:2: .*expected UTF-8"),
        ("a.jsonl", '{"file_name": "a.jpg", "text": "x"}\n{"file_name"\n', r"a\.jsonl:2: "),
        ("a.jsonl", "[1]\n", r"a\.jsonl:1: .*no JSON object"),
    ],
)
def test_a_damaged_table_is_refused_with_its_line(
    images: Path, tmp_path: Path, name: str, content: str | bytes, words: str
) -> None:
    (images / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=words):
        _packed(images / name, tmp_path / "out")


def test_a_source_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match="no such file"):
        _packed(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputNotFoundError, match="no pictures"):
        _packed(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_check_names_what_is_bad_and_goes_on_behind_damage(tmp_path: Path) -> None:
    folder = numbered_shards(tmp_path / "d", [3, 3])
    bad = [("x.png", png()[:-30]), ("x.txt", b"t"), ("y.png", png()), ("l.pkl", b"")]
    path = write_tar(folder / "002.tar", [*numbered_sample(9), *bad])
    config = DataConfig(shards=str(folder))
    result = stage.check(config, SilentReporter())
    assert not result["ok"]
    assert (result["samples"], result["good"]) == (9, 7)
    assert result["bad"] == {"damaged image": 1, "missing caption": 1}
    assert [(b["shard"], b["key"]) for b in result["bad_samples"]] == [(str(path), "x"), (str(path), "y")]
    assert result["ignored"] == {"pickle or array member": 1}
    path.write_bytes(path.read_bytes()[:-10_000])
    assert list(stage.check(config, SilentReporter())["damaged_shards"]) == [str(path)]
    path.unlink()
    assert stage.check(config, SilentReporter())["ok"]


def test_stats_count_and_measure(tmp_path: Path) -> None:
    members = [("a.png", png(size=(4, 9))), ("a.txt", b"one"), ("b.png", png(size=(8, 2))), ("b.txt", b"one")]
    members += [("c.png", png(size=(6, 6))), ("c.txt", b"three"), ("d.png", b"broken"), ("d.txt", b"x")]
    path = write_tar(tmp_path / "a.tar", members)
    result = stage.stats(DataConfig(shards=str(path)), SilentReporter())
    assert result["extensions"] == {"png": 4, "txt": 4}
    assert result["formats"] == {"png": 3}
    assert result["width"] == {"min": 4, "median": 6, "max": 8}
    assert result["height"] == {"min": 2, "median": 6, "max": 9}
    captions = result["captions"]
    assert (captions["samples"], captions["distinct"]) == (3, 2)
    assert captions["length"] == {"min": 3, "median": 3, "max": 5}
    assert captions["frequent"] == {"one": 2, "three": 1}
    assert result["unusable"] == {"not an image": 1}
    assert json.loads(json.dumps(result)) == result


def test_stats_give_the_upright_size_of_a_turned_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    Image.new("RGB", (12, 5)).save(stream, "JPEG", exif=exif)
    path = write_tar(tmp_path / "a.tar", [("a.jpg", stream.getvalue()), ("a.txt", b"x")])
    result = stage.stats(DataConfig(shards=str(path)), SilentReporter())
    assert (result["width"]["max"], result["height"]["max"]) == (5, 12)


def test_index_counts_and_writes_sizes_once(tmp_path: Path) -> None:
    config = DataConfig(shards=str(numbered_shards(tmp_path / "d", [3, 2])))
    sizes = tmp_path / "sizes.json"
    result = stage.index(config, SilentReporter(), sizes)
    assert json.loads(sizes.read_text()) == {"000.tar": 3, "001.tar": 2}
    assert (result["samples"], result["members"]["png"]) == (5, 5)
    with pytest.raises(OutputError, match=r"sizes\.json"):
        stage.index(config, SilentReporter(), sizes)


def test_synth_makes_shards_that_the_other_commands_read(tmp_path: Path) -> None:
    stage.synth(tmp_path / "s", 6, 32, 0, SilentReporter(), val_samples=2)
    config = DataConfig(shards=f"{tmp_path}/s/train-*.tar", label="json:num_objects")
    result = stage.check(config, SilentReporter())
    assert result["ok"]
    assert result["samples"] == 6


@pytest.mark.parametrize("prefix", ["../train-", "a/b-", "/tmp/"])
def test_a_prefix_that_leads_out_of_the_folder_is_refused(
    images: Path, tmp_path: Path, prefix: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert ldm(["data", "pack", str(images), str(tmp_path / "out"), "--prefix", prefix]) == 2
    assert "is no beginning of a file name" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
