"""`pack` on the folders and tables that people have, read back by the standard library's tarfile."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from ldm_cli.data.loader import Loader
from ldm_cli.data.pack import pack
from ldm_cli.data.sources import Choices
from ldm_cli.errors import DataError, InputNotFoundError
from ldm_cli.reporting import SilentReporter
from tests.data.tars import opened, png

Files = dict[str, str | bytes]


def _folder(root: Path, files: Files) -> Path:
    """Files below `root`; those called like pictures are all the same one if they have no content."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content.encode() if isinstance(content, str) else content
        path.write_bytes(data if data or name.endswith(".txt") else png())
    return root


def _samples(source: Path, out: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The samples that `pack` writes, members by extension, json parsed; and its report."""
    report = pack(source, out, SilentReporter())
    samples: dict[str, dict[str, Any]] = {}
    for shard in sorted(out.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                key, _, extension = member.name.partition(".")
                samples.setdefault(key, {})[extension] = file.read()
    for sample in samples.values():
        sample["json"] = json.loads(sample["json"], parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    return list(samples.values()), report


def _captions(samples: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Path to captions; txt must be the first of them."""
    for sample in samples:
        captions = sample["json"].get("captions", [])
        assert sample.get("txt", b"").decode() == (captions[0] if captions else "")
    return {sample["json"]["path"]: sample["json"].get("captions", []) for sample in samples}


def _csv(rows: list[list[str]], encoding: str = "utf-8", **dialect: Any) -> bytes:
    text = io.StringIO()
    csv.writer(text, **dialect).writerows(rows)
    return text.getvalue().encode(encoding)


ROWS = [["a.png", "señor, one"], ["b.png", "two"]]
JSON_ROWS = [{"file_name": "a.png", "text": "señor, one"}, {"file_name": "b.png", "text": "two"}]
COCO = {
    "images": [{"id": 10 + number, "file_name": name} for number, (name, _) in enumerate(ROWS)],
    "annotations": [{"id": 1, "image_id": 10 + number, "caption": text} for number, (_, text) in enumerate(ROWS)],
}
LINES = "\n".join(json.dumps(row) for row in JSON_ROWS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", _csv([["file_name", "text"], *ROWS])),
        ("metadata.csv", _csv([["Image_Path", "Alt Text"], *ROWS], delimiter=";")),
        ("list.csv", _csv([["img", "Description"], *ROWS], delimiter="|")),
        ("list.csv", b"sep=;\r\n" + _csv([["filename", "comment"], *ROWS], delimiter=";")),
        ("list.tsv", _csv([["filepath", "sentence"], *ROWS], delimiter="\t")),
        ("list.csv", _csv([["photo", "title"], *ROWS], "utf-16", delimiter="\t")),
        ("list.csv", _csv([["photo", "title"], *ROWS], "utf-16-le", delimiter=";")),
        ("list.csv", _csv([["photo", "title"], *ROWS], "cp1252")),
        ("list.csv", _csv([["photo", "title"], *ROWS], "utf-8-sig")),
        ("list.csv", _csv([["target_file_name", "prompt"], *ROWS], quoting=csv.QUOTE_ALL)),
        ("metadata.jsonl", LINES.encode("utf-16")),
        ("data.ndjson", LINES.encode()),
        ("data.json", json.dumps(JSON_ROWS).encode()),
        ("data.json", LINES.encode()),
        ("data.jsonl", b'{"image": "a.png", "caption": "se\\u00f1or, one"}\n{"image": "b.png", "title": "two"}'),
        ("captions_val.json", json.dumps(COCO).encode()),
        ("list.csv", _csv([[" image ", " caption "], *ROWS], lineterminator="\r")),
        ("captions.txt", _csv([["image", "caption"], *ROWS])),
        ("data.json", json.dumps(dict(ROWS)).encode()),
        ("data.json", json.dumps({name: {"caption": text, "tags": "x"} for name, text in ROWS}).encode()),
    ],
    ids=str,
)
def test_a_table_of_any_kind_is_found_in_its_folder_and_read(tmp_path: Path, name: str, content: bytes) -> None:
    source = _folder(tmp_path / "in", {"a.png": b"", "b.png": b"", name: content})
    samples, report = _samples(source, tmp_path / "out")
    assert _captions(samples) == {path: [text] for path, text in ROWS}
    assert (report["samples"], report["without_caption"], report["not_read"]) == (2, 0, {})


@pytest.mark.parametrize("prefix", ["C:\\pictures\\", "p\\q\\", ".\\p\\", "/data/of/another/machine/"])
def test_pictures_are_found_by_the_paths_of_another_machine(tmp_path: Path, prefix: str) -> None:
    table = _csv([["image", "caption"], *([prefix + name, text] for name, text in ROWS)])
    source = _folder(tmp_path / "in", {"p/q/a.png": b"", "b.png": b"", "list.csv": table})
    samples, report = _samples(source, tmp_path / "out")
    assert [sample["txt"].decode() for sample in samples] == [text for _, text in ROWS]
    assert (report["bad"], report["not_read"]) == ({}, {})


@pytest.mark.parametrize("folders", [("train", "test"), ("a/b", "a/c"), ("data/val", "data/train/deep")])
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "captions.tsv"])
def test_each_split_folder_has_a_table_of_its_own(tmp_path: Path, folders: tuple[str, str], name: str) -> None:
    files: Files = {}
    for number, folder in enumerate(folders):
        row = {"file_name": "same.png", "text": f"number {number}"}
        table = json.dumps(row).encode() if name.endswith("l") else b""
        delimiter = "\t" if name.endswith("tsv") else ","
        files[f"{folder}/same.png"] = png((number, 0, 0))
        files[f"{folder}/{name}"] = table or _csv([[*row], [*row.values()]], delimiter=delimiter)
    samples, _ = _samples(_folder(tmp_path / "in", files), tmp_path / "out")
    found = {sample["txt"].decode(): sample["png"] for sample in samples}
    assert found == {"number 0": png((0, 0, 0)), "number 1": png((1, 0, 0))}


@pytest.mark.parametrize(
    ("picture", "text"),
    [
        ("IMG_1.PNG", "IMG_1.TXT"),
        ("IMG_1.png", "img_1.Txt"),
        ("a.b.png", "a.b.caption"),
        ("x.png", "x.png.txt"),
        ("deep/er/x.Png", "deep/er/x.CAPTION"),
    ],
)
def test_a_caption_beside_its_picture_is_found_whatever_its_capitals(tmp_path: Path, picture: str, text: str) -> None:
    source = _folder(tmp_path / "in", {picture: png(), text: " a dog \n"})
    samples, report = _samples(source, tmp_path / "out")
    assert _captions(samples) == {picture: ["a dog"]}
    assert report["not_read"] == {}


def test_of_two_kinds_of_captions_beside_a_picture_txt_is_taken(tmp_path: Path) -> None:
    files: Files = {"a.png": b"", "a.caption": "from caption", "a.txt": "from txt", "a.json": '{"text": "from json"}'}
    samples, _ = _samples(_folder(tmp_path / "in", files), tmp_path / "out")
    assert _captions(samples) == {"a.png": ["from txt"]}


@pytest.mark.parametrize(
    ("data", "text", "remark"),
    [
        (
            "it\u2019s \u201cold\u201d \u2013 5 \u20ac".encode("cp1252"),
            "it\u2019s \u201cold\u201d \u2013 5 \u20ac",
            "Windows-1252 text",
        ),
        ("größer".encode("latin-1"), "größer", "Windows-1252 text"),
        ("a 猫".encode("utf-16"), "a 猫", "UTF-16 text"),
        ("a 猫".encode("utf-16-be").join((b"\xfe\xff", b"")), "a 猫", "UTF-16 text"),
        ("a black cat".encode("utf-16-le"), "a black cat", "UTF-16 text"),
        ("a 猫".encode("utf-32"), "a 猫", "UTF-32 text"),
        ("a 猫".encode("utf-8-sig"), "a 猫", None),
    ],
)
def test_text_in_any_usual_encoding_is_what_was_written(
    tmp_path: Path, data: bytes, text: str, remark: str | None
) -> None:
    samples, report = _samples(_folder(tmp_path / "in", {"a.png": b"", "a.txt": data}), tmp_path / "out")
    assert _captions(samples) == {"a.png": [text]}
    assert report["remarks"] == ({remark: 1} if remark else {})


def test_text_in_an_unknown_encoding_is_named_and_its_picture_left_out(tmp_path: Path) -> None:
    files: Files = {"a.png": b"", "a.txt": "犬と猫".encode("shift-jis"), "b.png": b"", "b.txt": "a dog"}
    samples, report = _samples(_folder(tmp_path / "in", files), tmp_path / "out")
    assert _captions(samples) == {"b.png": ["a dog"]}
    assert report["bad"] == {"unknown encoding": 1}
    assert report["bad_files"][0].startswith("a.png: unknown encoding")


@pytest.mark.parametrize(
    ("value", "captions"),
    [
        (["a dog", "a cat"], ["a dog", "a cat"]),
        (["a dog", None, " ", "a cat"], ["a dog", "a cat"]),
        (["only"], ["only"]),
        ('["a dog", "a cat"]', ["a dog", "a cat"]),
        ("['a dog', 'it is \"x\"']", ["a dog", 'it is "x"']),
        ([], []),
        (None, []),
        (float("nan"), []),
        ("  ", []),
        ("NaN", []),
        ("<NA>", []),
        ("#N/A", []),
        ("[]", []),
        ("a \ud83d\udc31 and half of one: \ud83d", ["a \U0001f431 and half of one: \ufffd"]),
        ("[a|b] (red:1.2)", ["[a|b] (red:1.2)"]),
        ("{a|b}", ["{a|b}"]),
        ("""['a sign "stop" "here"', 'two']""", ['a sign "stop" "here"', "two"]),
        ("""["the 'old' 'town'", 'two']""", ["the 'old' 'town'", "two"]),
    ],
)
def test_several_captions_stay_several_and_nothing_is_none(tmp_path: Path, value: Any, captions: list[str]) -> None:
    lines = [{"file_name": "a.png", "caption": value, "score": float("nan")}, {"file_name": "b.png", "caption": "x"}]
    files: Files = {"a.png": b"", "b.png": b"", "metadata.jsonl": "\n".join(map(json.dumps, lines))}
    samples, report = _samples(_folder(tmp_path / "in", files), tmp_path / "out")
    assert _captions(samples) == {"a.png": captions, "b.png": ["x"]}
    assert samples[0]["json"]["score"] is None
    assert (report["without_caption"], report["several_captions"]) == (not captions, len(captions) > 1)


def test_training_takes_each_of_several_captions_in_some_epoch_and_the_same_in_each_run(tmp_path: Path) -> None:
    row = {"file_name": "a.png", "text": ["one", "two", "three"]}
    source = _folder(tmp_path / "in", {"a.png": b"", "metadata.jsonl": json.dumps(row)})
    pack(source, tmp_path / "out", SilentReporter())
    shards, config = opened(tmp_path / "out", label=None, caption="json:captions")
    runs = [Loader(shards, config, seed=seed, batch_size=1) for seed in (0, 0, 1)]
    captions = [[batch.captions[0] for batch in loader.batches(0, 40)] for loader in runs]
    assert set(captions[0]) == {"one", "two", "three"}
    assert captions[0] == captions[1] != captions[2]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"sep=;\nimage;text\na.png;x\n\nb.png;y;z\n", 5),
        (b'image,text\na.png,"x\ny"\nb.png,y,z\n', 4),
        (b"image\ttext\r\nb.png\ty\tz\r\n", 2),
    ],
)
def test_a_row_that_does_not_fit_is_named_by_its_line_of_the_file(tmp_path: Path, content: bytes, line: int) -> None:
    files: Files = {"a.png": b"", "b.png": b"", "list.csv": content}
    with pytest.raises(DataError, match=rf"list\.csv:{line}: it has not the 2 columns"):
        _samples(_folder(tmp_path / "in", files), tmp_path / "out")


@pytest.mark.parametrize("value", [7, 0.5, True, {"en": "a dog"}, [{"raw": "a dog"}], [["a"], ["b"]], [1, 2]])
def test_what_is_no_text_is_refused_with_file_and_row(tmp_path: Path, value: Any) -> None:
    lines = [{"file_name": "a.png", "caption": "x"}, {"file_name": "b.png", "caption": value}]
    files: Files = {"a.png": b"", "b.png": b"", "metadata.jsonl": "\n".join(map(json.dumps, lines))}
    with pytest.raises(DataError, match=r"metadata\.jsonl:2: 'caption'.*expected text"):
        _samples(_folder(tmp_path / "in", files), tmp_path / "out")


@pytest.mark.parametrize(
    "cell", ["['a dog'\n 'a cat']", """["it's" 'two']""", "['a', 'b' 'c']", "{'raw': 'a dog'}", '{"en": "a dog"}']
)
def test_the_print_of_a_structure_in_a_cell_is_refused_with_file_and_row(tmp_path: Path, cell: str) -> None:
    files: Files = {"a.png": b"", "list.csv": _csv([["image", "caption"], ["a.png", cell]])}
    with pytest.raises(DataError, match=r"list\.csv:\d: 'caption'"):
        _samples(_folder(tmp_path / "in", files), tmp_path / "out")


def test_rows_of_one_picture_are_its_captions(tmp_path: Path) -> None:
    rows = [["image", "n", "caption"], ["a.png", "0", "one"], ["a.png", "1", "two, too"], ["b.png", "0", "three"]]
    source = _folder(tmp_path / "in", {"Images/a.png": b"", "Images/b.png": b"", "captions.csv": _csv(rows)})
    samples, _ = _samples(source, tmp_path / "out")
    assert _captions(samples) == {"a.png": ["one", "two, too"], "b.png": ["three"]}
    assert [sample["json"]["n"] for sample in samples] == [["0", "1"], "0"]


def test_all_rows_of_a_picture_give_facts_and_its_class(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"image": "a.png", "caption": "one", "title": "T"},
        {"image": "a.png", "title": "two", "n": 1},
        {"image": "a.png", "caption": "three", "n": 1, "class": "dog"},
    ]
    files: Files = {"a.png": b"", "list.jsonl": "\n".join(map(json.dumps, rows))}
    samples, report = _samples(_folder(tmp_path / "in", files), tmp_path / "out")
    facts = samples[0]["json"]
    assert facts["captions"] == ["one", "two", "three"]
    assert (facts["title"], facts["n"], facts["class"]) == (["T", None, None], [None, 1, 1], [None, None, "dog"])
    assert (samples[0]["cls"], report["classes"]) == (b"0", {"dog": 0})


@pytest.mark.parametrize(
    ("layout", "prefix"), [("{}/1.png", ""), ("train/{}/1.png", ""), ("{}/x.y.png", ""), ("a/b/{}/1.png", "")]
)
def test_class_folders_give_labels_in_sorted_order_and_captions(tmp_path: Path, layout: str, prefix: str) -> None:
    names = ["tabby_cat", "Dog", "bird"]
    source = _folder(tmp_path / "in", {layout.format(name): b"" for name in names})
    samples, report = _samples(source, tmp_path / "out")
    expected = {layout.format(name): [f"a photo of a {name.replace('_', ' ')}"] for name in names}
    assert _captions(samples) == expected
    # As Hugging Face's imagefolder numbers them: by the sorted names.
    labels = {sample["json"]["path"]: int(sample["cls"]) for sample in samples}
    assert labels == {layout.format(name): number for number, name in enumerate(sorted(names))}
    assert report["captions_from_class_names"] == 3


@pytest.mark.parametrize(
    "names", [("2021", "2022"), ("100APPLE", "101APPLE"), ("n01440764", "n01443537"), ("train", "val"), ("one",)]
)
def test_folders_that_are_no_classes_give_no_captions(tmp_path: Path, names: tuple[str, ...]) -> None:
    samples, report = _samples(_folder(tmp_path / "in", {f"{n}/1.png": b"" for n in names}), tmp_path / "out")
    assert [captions for captions in _captions(samples).values() if captions] == []
    assert report["without_caption"] == len(names)


@pytest.mark.parametrize(
    ("image", "column"), [("image", "label"), ("img_id", "class_name"), ("image_id", "Category"), ("ImageID", "target")]
)
def test_a_class_column_gives_labels_and_captions(tmp_path: Path, image: str, column: str) -> None:
    suffix = "" if image.lower().endswith("id") else ".png"
    rows = [
        [image, column],
        *([f"{name}{suffix}", text] for name, text in zip("abc", ("dog", "cat", "dog"), strict=True)),
    ]
    source = _folder(tmp_path / "in", {"a.png": b"", "b.png": b"", "c.png": b"", "labels.csv": _csv(rows)})
    samples, report = _samples(source, tmp_path / "out")
    assert _captions(samples) == {
        f"{n}{suffix}": [f"a photo of a {c}"] for n, c in zip("abc", ("dog", "cat", "dog"), strict=True)
    }
    assert [sample["cls"] for sample in samples] == [b"1", b"0", b"1"]
    assert report["classes"] == {"cat": 0, "dog": 1}


@pytest.mark.parametrize(("cell", "label"), [("3.0", b"3"), ("-1", None), ("007", b"7"), ("", None)])
def test_a_number_of_a_class_is_no_name(tmp_path: Path, cell: str, label: bytes | None) -> None:
    source = _folder(tmp_path / "in", {"a.png": b"", "labels.csv": _csv([["image", "label"], ["a.png", cell]])})
    samples, report = _samples(source, tmp_path / "out")
    assert (samples[0].get("cls"), report["without_caption"], report["classes"]) == (label, 1, {})


def test_numbers_of_classes_are_kept_and_a_caption_column_goes_first(tmp_path: Path) -> None:
    rows = [["image", "label", "text"], ["a.png", "7", "a dog"], ["b.png", "3", ""]]
    source = _folder(tmp_path / "in", {"a.png": b"", "b.png": b"", "labels.csv": _csv(rows)})
    samples, report = _samples(source, tmp_path / "out")
    assert _captions(samples) == {"a.png": ["a dog"], "b.png": []}
    assert [sample["cls"] for sample in samples] == [b"7", b"3"]
    assert report["without_caption"] == 1


@pytest.mark.parametrize(
    ("folder", "times", "name"), [("3_sks dog", 3, "sks dog"), ("2_1girl", 2, "1girl"), ("1_x y z", 1, "x y z")]
)
def test_kohya_folders_repeat_their_pictures(tmp_path: Path, folder: str, times: int, name: str) -> None:
    files: Files = {f"{folder}/a.png": b"", f"{folder}/a.caption": "a dog", f"{folder}/b.png": b"", "1_reg/c.png": b""}
    samples, report = _samples(_folder(tmp_path / "in", files), tmp_path / "out")
    texts = [sample["txt"].decode() for sample in samples]
    assert {text: texts.count(text) for text in texts} == {"a dog": times, name: times, "reg": 1}
    assert report["repeats"] == {folder: times, "1_reg": 1}


@pytest.mark.parametrize("names", [("0_cat", "1_dog"), ("00_cat", "01_dog", "02_bird"), ("0_a", "10_b")])
def test_numbered_class_folders_from_zero_are_no_repeats(tmp_path: Path, names: tuple[str, ...]) -> None:
    samples, report = _samples(_folder(tmp_path / "in", {f"{name}/1.png": b"" for name in names}), tmp_path / "out")
    assert [sample["cls"] for sample in samples] == [str(number).encode() for number in range(len(names))]
    assert (report["repeats"], report["classes"]) == ({}, {name: number for number, name in enumerate(names)})


@pytest.mark.parametrize("names", [("10_sks dog", "x"), ("3_a", "reg", "2_b"), ("5_style", "0", "raw")])
def test_folders_of_which_some_are_kohyas_get_no_captions(tmp_path: Path, names: tuple[str, ...]) -> None:
    samples, report = _samples(_folder(tmp_path / "in", {f"{name}/1.png": b"" for name in names}), tmp_path / "out")
    assert [captions for captions in _captions(samples).values() if captions] == []
    assert (report["without_caption"], report["classes"], report["repeats"]) == (len(names), {}, {})


@pytest.mark.parametrize(
    ("columns", "cause"),
    [
        (["id", "breed"], "no column of pictures is known among 'id', 'breed'"),
        (["image", "path_length"], "no column of captions or classes is known among 'image', 'path_length'"),
        (["image", "text", "text"], "two columns are called 'text'"),
    ],
)
def test_a_table_beside_pictures_that_is_not_read_is_named_with_its_cause(
    tmp_path: Path, columns: list[str], cause: str
) -> None:
    files: Files = {"a.png": b"", "labels.csv": _csv([columns, ["a.png", "1", "2"][: len(columns)]])}
    _, report = _samples(_folder(tmp_path / "in", files), tmp_path / "out")
    assert report["not_read"] == {".csv": 1}
    assert report["not_read_files"] == [f"labels.csv: {cause}"]


@pytest.mark.parametrize("kind", [".heic", ".CR2", ".psd", ".mov", ".tar", ".xlsx"])
def test_what_is_not_read_is_named_and_counted(tmp_path: Path, kind: str) -> None:
    files: Files = {"a.png": b"", "a.txt": "a dog", f"b{kind}": b"?", f"sub/c{kind}": b"?", ".DS_Store": b"?"}
    _, report = _samples(_folder(tmp_path / "in", files), tmp_path / "out")
    assert report["not_read"] == {kind.lower(): 2, "hidden or system file": 1}
    assert report["not_read_files"] == [".DS_Store", f"b{kind}", f"sub/c{kind}"]
    (tmp_path / "in" / "a.png").unlink()
    with pytest.raises(InputNotFoundError, match=rf"2 × {kind.lower()}.*b{kind}"):
        pack(tmp_path / "in", tmp_path / "out-2", SilentReporter())


def test_pictures_that_are_missing_unnamed_or_remote_are_named_and_counted(tmp_path: Path) -> None:
    rows = [["image", "text"], ["a.png", "x"], ["gone.png", "x"], ["http://h/b.png", "x"], ["", "x"], ["twice", "x"]]
    files: Files = {"a.png": b"", "c.png": b"", "p/twice.png": b"", "q/twice.png": b"", "metadata.csv": _csv(rows)}
    samples, report = _samples(_folder(tmp_path / "in", files), tmp_path / "out")
    assert _captions(samples) == {"a.png": ["x"]}
    assert report["bad"] == {"missing file": 1, "remote picture": 1, "no picture named": 1, "ambiguous file": 1}
    assert report["not_read"] == {"picture that no table names": 3}
    assert "c.png" in report["not_read_files"]


def test_linked_folders_are_entered_once_and_loops_end(tmp_path: Path) -> None:
    source = _folder(tmp_path / "in", {"a/1.png": b"", "a/1.txt": "one"})
    _folder(tmp_path / "elsewhere", {"2.png": b"", "2.txt": "two"})
    (source / "b").symlink_to(tmp_path / "elsewhere")
    (source / "a" / "loop").symlink_to(source)
    samples, report = _samples(source, tmp_path / "out")
    assert _captions(samples) == {"a/1.png": ["one"], "b/2.png": ["two"]}
    assert report["not_read"] == {"folder linked twice": 1}


@pytest.mark.parametrize("name", ["b.png", "a.txt", "metadata.csv", "c/d.jpg"])
def test_dangling_links_and_pipes_are_passed_over_and_named(tmp_path: Path, name: str) -> None:
    source = _folder(tmp_path / "in", {"a.png": b"", "c/a.png": b""})
    os.mkfifo(source / name)
    (source / "c" / f"x-{Path(name).name}").symlink_to("nothing")
    samples, report = _samples(source, tmp_path / "out")
    assert sorted(_captions(samples)) == ["a.png", "c/a.png"]
    assert report["not_read"] == {"no regular file": 2}
    assert sorted(report["not_read_files"]) == sorted([name, f"c/x-{Path(name).name}"])


@pytest.mark.parametrize("name", ["b.png", "b.txt", "b.caption"])
def test_a_file_that_fails_while_it_is_read_costs_its_picture_alone(tmp_path: Path, name: str) -> None:
    source = _folder(tmp_path / "in", {"a.png": b"", "b.png": b""})
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to("/proc/self/mem")  # opens, and gives EIO
    samples, report = _samples(source, tmp_path / "out")
    assert [*_captions(samples)] == ["a.png"]
    assert report["bad_files"] == ["b.png: unreadable file: Input/output error"]


@pytest.mark.parametrize("name", ["metadata.csv", "list.tsv", "list.json", "list.jsonl"])
def test_a_table_that_fails_while_it_is_read_is_named_in_the_error(tmp_path: Path, name: str) -> None:
    source = _folder(tmp_path / "in", {"x.md": "x"})
    (source / name).symlink_to("/proc/self/mem")
    for named in (source, source / name):
        with pytest.raises(DataError, match=rf"cannot read '.*{name}': Input/output error"):
            _samples(named, tmp_path / "out")


@pytest.mark.parametrize("name", ["n" * 300 + ".png", "p/" * 3000 + "x.png", "a\0.png"])
def test_a_name_that_no_file_can_have_is_a_missing_file(tmp_path: Path, name: str) -> None:
    rows = [{"file_name": "a.png", "text": "x"}, {"file_name": name, "text": "x"}]
    files: Files = {"a.png": b"", "metadata.jsonl": "\n".join(map(json.dumps, rows))}
    _, report = _samples(_folder(tmp_path / "in", files), tmp_path / "out")
    assert (report["samples"], report["bad"]) == (1, {"missing file": 1})


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_picture_is_found_by_its_name_in_linked_folders_and_not_in_hidden_ones(
    tmp_path: Path, as_folder: bool
) -> None:
    files: Files = {"p/a.png": b"", ".trash/a.png": png((1, 1, 1)), "list.csv": _csv([["image", "text"], *ROWS])}
    source = _folder(tmp_path / "in", files)
    _folder(tmp_path / "elsewhere", {"b.png": b""})
    (source / "q").symlink_to(tmp_path / "elsewhere")
    samples, report = _samples(source if as_folder else source / "list.csv", tmp_path / "out")
    assert _captions(samples) == {path: [text] for path, text in ROWS}
    assert report["bad"] == {}


@pytest.mark.parametrize(
    "value",
    [
        {"images": {"a.png": 1}, "annotations": []},
        {"images": ["a.png"], "annotations": []},
        {"images": [{"id": 1, "file_name": "a.png"}], "annotations": "x"},
        {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [None]},
        {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": [1], "caption": "x"}]},
        {"images": [{"id": {}, "file_name": "a.png"}], "annotations": [{"image_id": 1, "caption": "x"}]},
    ],
    ids=str,
)
def test_what_looks_like_coco_and_is_not_is_refused_by_name(tmp_path: Path, value: dict[str, Any]) -> None:
    source = _folder(tmp_path / "in", {"a.png": b"", "captions.json": json.dumps(value)})
    with pytest.raises(DataError, match=r"captions\.json': '(images|annotations)' is no list of objects"):
        pack(source / "captions.json", tmp_path / "out", SilentReporter())


@pytest.mark.parametrize("cell", ["9" * 400, "{'raw': 'dog'}", "[['dog']]"])
def test_a_class_of_any_text_is_a_class(tmp_path: Path, cell: str) -> None:
    source = _folder(tmp_path / "in", {"a.png": b"", "l.csv": _csv([["image", "label", "text"], ["a.png", cell, "x"]])})
    samples, report = _samples(source, tmp_path / "out")
    assert (samples[0]["cls"], report["classes"]) == (b"0", {cell: 0})


def test_two_pictures_of_one_stem_share_its_caption_and_two_captions_are_refused(tmp_path: Path) -> None:
    files: Files = {"a.png": b"", "a.PNG": png((1, 1, 1)), "a.txt": "x", "b.png": b"", "b.txt": "x", "b.TXT": "y"}
    samples, report = _samples(_folder(tmp_path / "in", files), tmp_path / "out")
    assert _captions(samples) == {"a.png": ["x"], "a.PNG": ["x"]}
    assert report["bad"] == {"ambiguous caption": 1}


def test_two_captions_beside_a_picture_near_a_table_are_refused_too(tmp_path: Path) -> None:
    files: Files = {
        "a.png": b"",
        "b.png": b"",
        "b.txt": "x",
        "b.TXT": "y",
        "list.csv": _csv([["image", "text"], ROWS[0]]),
    }
    samples, report = _samples(_folder(tmp_path / "in", files), tmp_path / "out")
    assert _captions(samples) == {"a.png": [ROWS[0][1]]}
    assert report["bad"] == {"ambiguous caption": 1}


def test_a_column_that_no_table_has_is_refused(tmp_path: Path) -> None:
    source = _folder(tmp_path / "in", {"a.png": b"", "list.csv": _csv([["image", "text"], ROWS[0]])})
    with pytest.raises(DataError, match="no column 'satz' among 'image', 'text'"):
        pack(source, tmp_path / "out", SilentReporter(), choices=Choices(caption_column="satz"))
    report = pack(source, tmp_path / "out", SilentReporter(), choices=Choices(caption_column=""))
    assert report["without_caption"] == 1
    (source / "list.csv").unlink()
    with pytest.raises(DataError, match="no table in it has a column 'satz'"):
        pack(source, tmp_path / "other", SilentReporter(), choices=Choices(caption_column="satz"))
    (source / "a.json").write_text('{"satz": "a dog"}')
    report = pack(source, tmp_path / "other", SilentReporter(), choices=Choices(caption_column="satz"))
    assert report["without_caption"] == 0


def test_a_table_that_is_not_read_is_named_with_the_remedy_where_captions_are_missing(tmp_path: Path) -> None:
    source = _folder(tmp_path / "in", {"a.png": b"", "list.csv": _csv([["image", "satz"], ROWS[0]])})
    pack(source, tmp_path / "out", reporter := SilentReporter())
    cause = "no column of captions or classes is known among 'image', 'satz'"
    (message,) = reporter.messages
    assert f"samples without a caption: 1; not read: list.csv: {cause}; name it with --image-column" in message
    (source / "a.txt").write_text("a dog")
    pack(source, tmp_path / "other", reporter := SilentReporter())
    assert reporter.messages == []


def test_files_of_img2dataset_keep_caption_and_facts(tmp_path: Path) -> None:
    facts = {"caption": "a dog", "url": "http://h/1", "similarity": float("nan"), "exif": "{}"}
    files: Files = {"00000/000000000.png": b"", "00000/000000000.txt": "a dog", "00000_stats.json": '{"count": 1}'}
    files |= {
        "00000/000000000.json": json.dumps(facts),
        "00000/000000001.png": b"",
        "00000/000000001.json": '{"text": "b"}',
    }
    samples, report = _samples(_folder(tmp_path / "in", files), tmp_path / "out")
    assert _captions(samples) == {"00000/000000000.png": ["a dog"], "00000/000000001.png": ["b"]}
    assert samples[0]["json"]["url"] == "http://h/1"
    assert samples[0]["json"]["similarity"] is None
    assert report["not_read"] == {".json": 1}


def _arrow_classes(names: list[str]) -> dict[bytes, bytes]:
    features = {"label": {"names": names, "_type": "ClassLabel"}}
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


@pytest.mark.parametrize("name", ["a.parquet", "b.csv", "c.jsonl"])
def test_a_damaged_table_alone_in_a_folder_is_named(tmp_path: Path, name: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    source = _folder(tmp_path / "in", {name: "PAR1 {broken"})
    with pytest.raises(DataError, match=name):
        _samples(source, tmp_path / "out")


@pytest.mark.parametrize("shape", ["struct", "bytes", "path", "struct of a path", "class"])
def test_parquet_holds_pictures_or_names_them(tmp_path: Path, shape: str) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet: Any = pytest.importorskip("pyarrow.parquet")
    pictures = [png((1, 0, 0)), png((2, 0, 0))]
    source = _folder(
        tmp_path / "in", {"a.png": pictures[0], "b.png": pictures[1]} if "path" in shape else {"x.md": "x"}
    )
    cells: dict[str, list[Any]] = {
        "struct": [{"bytes": data, "path": None} for data in pictures],
        "class": [{"bytes": data, "path": "p.png"} for data in pictures],
        "bytes": pictures,
        "path": ["a.png", "b.png"],
        "struct of a path": [{"bytes": None, "path": name} for name in ("a.png", "b.png")],
    }
    columns = {
        "image": cells[shape],
        **({"label": [1, 0]} if shape == "class" else {"text": [["one", "uno"], ["two"]]}),
    }
    table = arrow.table(columns)
    if shape == "class":
        table = table.replace_schema_metadata(_arrow_classes(["cat", "dog"]))
    parquet.write_table(table, source / "train-00000-of-00001.parquet")
    samples, _ = _samples(source, tmp_path / "out")
    assert [sample["png"] for sample in samples] == pictures
    expected = [["a photo of a dog"], ["a photo of a cat"]] if shape == "class" else [["one", "uno"], ["two"]]
    assert [sample["json"]["captions"] for sample in samples] == expected
    assert [sample.get("cls") for sample in samples] == ([b"1", b"0"] if shape == "class" else [None, None])


@pytest.mark.parametrize("with_text", [True, False])
def test_the_classes_of_a_parquet_column_of_any_name_are_found(tmp_path: Path, with_text: bool) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet: Any = pytest.importorskip("pyarrow.parquet")
    texts = {"text": ["x", "y"]} if with_text else {}
    table = arrow.table({"img": [png((1, 0, 0)), png((2, 0, 0))], "fine_label": [1, 0], **texts})
    features = {"fine_label": {"names": ["cat", "dog"]}, "tags": [{"dtype": "string"}]}
    table = table.replace_schema_metadata({b"huggingface": json.dumps({"info": {"features": features}}).encode()})
    source = _folder(tmp_path / "in", {"x.md": "x"})
    parquet.write_table(table, source / "a.parquet")
    samples, report = _samples(source, tmp_path / "out")
    expected = [["x"], ["y"]] if with_text else [["a photo of a dog"], ["a photo of a cat"]]
    assert [sample["json"]["captions"] for sample in samples] == expected
    assert ([sample["cls"] for sample in samples], report["classes"]) == ([b"1", b"0"], {"cat": 0, "dog": 1})


@pytest.mark.parametrize("facts", [b"{broken", b"[]", b'{"info": []}', b'{"info": {"features": {"n": 3}}}'])
def test_a_parquet_file_with_foreign_metadata_is_read(tmp_path: Path, facts: bytes) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet: Any = pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"image": [png()], "text": ["x"]}).replace_schema_metadata({b"huggingface": facts})
    source = _folder(tmp_path / "in", {"x.md": "x"})
    parquet.write_table(table, source / "a.parquet")
    assert _samples(source, tmp_path / "out")[1]["samples"] == 1


def test_the_caption_of_a_picture_is_never_its_file_name(tmp_path: Path) -> None:
    files: Files = {"a.png": b"", "a.png.json": '{"title": "a.png"}', "b.png": b"", "b.json": '{"title": "a dog"}'}
    samples, _ = _samples(_folder(tmp_path / "in", files), tmp_path / "out")
    assert _captions(samples) == {"a.png": [], "b.png": ["a dog"]}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.zip", b"PK", "a.zip'.*no table"),
        ("a.tar", b"", "a tar is a shard already"),
        (
            "a.csv",
            b"left_file_name,right_file_name,text\nx,y,z\n",
            "'left_file_name', 'right_file_name'.*--image-column",
        ),
        ("a.csv", b"image,text,text\nx,y,z\n", "two columns are called 'text'"),
        ("a.csv", b"image,label\na.png,a red circle on the left of it\n", r"a\.csv:2: .*too long.*--caption-column"),
        ("a.json", b'{"count": 3}', "expected a list of objects"),
    ],
)
def test_what_is_ambiguous_or_of_another_kind_is_refused(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    _folder(tmp_path, {name: content or b"x", "a.png": b""})
    with pytest.raises(DataError, match=words):
        pack(tmp_path / name, tmp_path / "out", SilentReporter())
