"""`ldm clip` on drawn scenes with a small CLIP: results, their fields in JSON, sheets, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from ldm_cli.cli.app import run as run_program
from ldm_cli.errors import DataError, InputNotFoundError, OutputError, UsageError
from ldm_cli.evaluation.clip_features import CLIPFeatures
from ldm_cli.evaluation.questions import statement
from ldm_cli.reporting import SilentReporter
from ldm_cli.stages import clip_answers, clip_embed, clip_search
from ldm_cli.stages.clip_search import Wanted
from ldm_cli.stages.support.clip_inputs import Clip, ClipOptions, open_picture_sets, texts_of

LABELS = ("circle", "square", "ring")


@pytest.fixture
def val(scenes: Path) -> str:
    return str(scenes / "val-*.tar")


@pytest.fixture
def options(clip_run: Path) -> ClipOptions:
    return ClipOptions(str(clip_run), "cpu", 10)


@pytest.fixture
def features(clip_run: Path) -> CLIPFeatures:
    return CLIPFeatures.load(clip_run / "model", torch.device("cpu"))


@pytest.fixture
def embedded(val: str, options: ClipOptions, tmp_path: Path) -> Path:
    clip_embed.run([val], None, tmp_path / "val.npy", options, SilentReporter())
    return tmp_path / "val.npy"


def fields(value: Any) -> Any:
    """The names of all fields, provenance left out; a list has those of its first entry."""
    if isinstance(value, Mapping):
        return {name: fields(inner) for name, inner in value.items() if name != "provenance"}
    return [fields(value[0])] if isinstance(value, list) and value else None


PICTURE = {"source": None, "name": None}
FIELDS: dict[str, tuple[list[str], Any]] = {
    "embed": (["--out", "x.npy"], dict.fromkeys(("file", "num_embeddings", "dimension"))),
    "search": (
        ["--text", "a red circle"],
        {
            "queries": [{"text": None, "results": [{"rank": None, "cosine": None, "row": None, **PICTURE}]}],
            "num_searched": None,
        },
    ),
    "classify": (
        ["--labels", ",".join(LABELS), "--templates", "a {}"],
        {
            "pictures": [{**PICTURE, "results": [{"label": None, "probability": None, "cosine": None}]}],
            "num_labels": None,
            "templates": [None],
        },
    ),
    "tag": ([], {"pictures": [{**PICTURE, "results": [{"caption": None, "cosine": None}]}], "num_captions": None}),
    "ask": (
        ["What colour is it?", "--answers", "red,blue"],
        {
            "question": None,
            "pictures": [
                {**PICTURE, "results": [{"answer": None, "statement": None, "probability": None, "cosine": None}]}
            ],
        },
    ),
    "score": (
        [],
        {
            **dict.fromkeys(("mean_cosine", "clip_score", "clipscore_hessel", "num_samples")),
            "clip_score_interval": [None],
            "pictures": [{**PICTURE, "caption": None, "cosine": None, "clipscore_hessel": None}],
        },
    ),
}


@pytest.mark.parametrize("command", FIELDS)
def test_the_fields_of_each_result_are_those_of_the_documentation(
    command: str,
    val: str,
    clip_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, expected = FIELDS[command]
    line = ["clip", command, val, *arguments, "--model", str(clip_run), "--device", "cpu"]
    assert run_program([*line, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert fields(result) == expected
    assert set(result["provenance"]) == {"date", "environment", "device", "clip", "pictures"}
    assert set(result["provenance"]["clip"]) == {"model", "sha256", "processor"}
    assert run_program([*line, "--overwrite"] if command == "embed" else line) == 0
    assert ("num embeddings" if command == "embed" else "0000") in capsys.readouterr().out


def test_embeddings_are_unit_vectors_of_the_pictures_in_order(
    embedded: Path, val: str, features: CLIPFeatures, options: ClipOptions
) -> None:
    pictures = open_picture_sets([val], SilentReporter())[0]
    expected = F.normalize(torch.cat([features.pictures([pictures.picture(i)]) for i in range(24)]), dim=1)
    assert np.abs(np.load(embedded) - expected.numpy()).max() < 1e-5
    names = [json.loads(line) for line in embedded.with_suffix(".names.jsonl").read_text().splitlines()]
    assert names == [{"source": val, "name": name} for name, _ in pictures.files]
    about = json.loads(embedded.with_suffix(".json").read_text())
    assert about["clip"]["processor"]["crop_size"] == {"height": 32, "width": 32}
    assert about["pictures"][0]["num_pictures"] == 24


def test_a_file_of_embeddings_is_searched_with_its_own_model_and_gives_what_the_pictures_give(
    embedded: Path, val: str, options: ClipOptions, tmp_path: Path
) -> None:
    first = clip_search.run([val], Wanted(["a red circle"], top=24), options, SilentReporter())
    again = clip_search.run([str(embedded)], Wanted(["a red circle"], top=24), ClipOptions("", "cpu"), SilentReporter())
    names = [[entry["name"] for entry in result["queries"][0]["results"]] for result in (first, again)]
    assert names[0] == names[1]
    assert again["provenance"]["embeddings"]["file"] == str(embedded)


def test_embeddings_of_other_weights_are_refused(embedded: Path, options: ClipOptions) -> None:
    about = json.loads(embedded.with_suffix(".json").read_text())
    about["clip"]["sha256"] = "0" * 64
    embedded.with_suffix(".json").write_text(json.dumps(about))
    with pytest.raises(DataError, match="other weights than"):
        clip_search.run([str(embedded)], Wanted(["a"]), options, SilentReporter())
    embedded.with_suffix(".json").unlink()
    with pytest.raises(UsageError, match="a model is missing"):
        clip_search.run([str(embedded)], Wanted(["a"]), ClipOptions("", "cpu"), SilentReporter())
    np.save(embedded, np.ones((3, 5), dtype=np.float32))
    with pytest.raises(DataError, match="its vectors have 5 numbers, those of the model 16"):
        clip_search.run([str(embedded)], Wanted(["a"]), options, SilentReporter())


def test_a_picture_finds_itself_and_the_sheet_shows_it_twice(
    embedded: Path, val: str, options: ClipOptions, tmp_path: Path
) -> None:
    pixels = open_picture_sets([val], SilentReporter())[0].picture(5)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / "query.png")
    wanted = Wanted(pictures=[tmp_path / "query.png"], top=3, sheet=tmp_path / "sheet.png")
    best = clip_search.run([str(embedded)], wanted, options, SilentReporter())["queries"][0]["results"][0]
    assert (best["row"], best["cosine"]) == (5, pytest.approx(1.0, abs=1e-5))
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))[-128:]
    first, second = sheet[:, -3 * 132 - 128 : -3 * 132], sheet[:, -2 * 132 - 128 : -2 * 132]
    assert (first == second).all()
    assert (first[::4, ::4] == pixels.permute(1, 2, 0).numpy()).all()


def test_a_search_without_a_query_or_into_an_odd_sheet_is_refused(val: str, options: ClipOptions) -> None:
    for wanted in (Wanted(), Wanted(["a"], sheet=Path("x.txt"))):
        with pytest.raises(UsageError):
            clip_search.run([val], wanted, options, SilentReporter())


def test_a_query_is_a_text_that_says_something_or_one_picture(
    val: str, pairs: Path, options: ClipOptions, tmp_path: Path
) -> None:
    with pytest.raises(InputNotFoundError, match="there is no 'nowhere'; give a picture, a folder, or shards"):
        clip_search.run(["nowhere"], Wanted(["a"]), options, SilentReporter())
    with pytest.raises(UsageError, match="a text to search for is blank"):
        clip_search.run([val], Wanted(["a", " "]), options, SilentReporter())
    for query in (pairs, tmp_path / "missing.png", Path(val)):
        with pytest.raises(InputNotFoundError, match="is not a picture; give one picture to each --like"):
            clip_search.run([val], Wanted(pictures=[query]), options, SilentReporter())


def test_pictures_that_cannot_be_read_are_named_and_left_out(
    pairs: Path, options: ClipOptions, features: CLIPFeatures, tmp_path: Path
) -> None:
    before = open_picture_sets([str(pairs)], SilentReporter())[0]
    expected = F.normalize(features.pictures([before.picture(0), before.picture(2), before.picture(3)]), dim=1)
    (pairs / "1.png").write_bytes((pairs / "1.png").read_bytes()[:60])
    (pairs / "0a.jpg").write_bytes(b"")
    (pairs / "0a.txt").write_text("nothing")
    reporter = SilentReporter()
    clip_embed.run([str(pairs)], None, tmp_path / "x.npy", ClipOptions(options.model, "cpu", 1), reporter)
    assert np.abs(np.load(tmp_path / "x.npy") - expected.numpy()).max() < 1e-5
    names = [json.loads(line)["name"] for line in (tmp_path / "x.names.jsonl").read_text().splitlines()]
    assert names == ["0.png", "2.png", "3.png"]
    (warning,) = [text for text in reporter.messages if "cannot be read" in text]
    assert "2 of 5 pictures cannot be read and are left out: '0a.jpg' (" in warning
    assert "'1.png' (" in warning
    about = json.loads((tmp_path / "x.json").read_text())["pictures"][0]
    assert (about["num_pictures"], about["unreadable"]) == (3, ["0a.jpg", "1.png"])
    scores = clip_answers.score([str(pairs)], None, options, reporter)["pictures"]
    assert [(one["name"], one["caption"]) for one in scores] == [("0.png", "a red circle"), ("2.png", "a blue square")]
    wanted = Wanted(pictures=[pairs / "3.png", pairs / "1.png"])
    with pytest.raises(DataError, match=r"no picture can be read: '1\.png'"):
        clip_search.run([str(pairs)], wanted, options, SilentReporter())
    best = clip_search.run([str(pairs)], Wanted(pictures=[pairs / "3.png"]), options, SilentReporter())
    assert best["queries"][0]["results"][0]["name"] == "3.png"


def test_the_templates_of_the_paper_are_80_and_each_has_one_place() -> None:
    templates = texts_of(str(clip_answers._IMAGENET_FILE), "")
    assert (len(templates), len(set(templates))) == (80, 80)
    assert all(template.count("{}") == 1 for template in templates)


def test_a_label_is_the_normalized_mean_of_its_normalized_prompts(
    val: str, options: ClipOptions, features: CLIPFeatures
) -> None:
    result = clip_answers.classify([val], ",".join(LABELS), "imagenet", 3, options, SilentReporter())
    templates = texts_of(str(clip_answers._IMAGENET_FILE), "")
    vectors = []
    for label in LABELS:
        prompts = features.texts([template.replace("{}", label) for template in templates]).numpy()
        mean = (prompts / np.linalg.norm(prompts, axis=1, keepdims=True)).mean(0)
        vectors.append(mean / np.linalg.norm(mean))
    image = features.pictures([open_picture_sets([val], SilentReporter())[0].picture(3)])[0].numpy()
    cosines = np.stack(vectors) @ image / np.linalg.norm(image)
    found = {entry["label"]: entry for entry in result["pictures"][3]["results"]}
    assert [found[label]["cosine"] for label in LABELS] == pytest.approx(cosines.tolist(), abs=1e-5)
    weights = np.exp(features.logit_scale * cosines)
    assert [found[label]["probability"] for label in LABELS] == pytest.approx(
        (weights / weights.sum()).tolist(), abs=1e-5
    )
    assert (result["templates"], result["num_labels"]) == ("imagenet", 3)


def test_probabilities_of_the_best_labels_count_the_others_too(val: str, options: ClipOptions) -> None:
    whole = clip_answers.classify([val], ",".join(LABELS), "a {}", 3, options, SilentReporter())
    best = clip_answers.classify([val], ",".join(LABELS), "a {}", 1, options, SilentReporter())
    assert [one["results"][:1] for one in whole["pictures"]] == [one["results"] for one in best["pictures"]]
    assert all(sum(e["probability"] for e in one["results"]) == pytest.approx(1) for one in whole["pictures"])


def test_a_template_without_a_place_is_refused(val: str, options: ClipOptions) -> None:
    with pytest.raises(UsageError, match="'a photo' has no place for a label"):
        clip_answers.classify([val], "a", "a photo", 1, options, SilentReporter())


def test_tags_come_from_the_pictures_own_captions_from_a_file_or_from_other_shards(
    val: str, scenes: Path, options: ClipOptions, tmp_path: Path
) -> None:
    own = clip_answers.tag([val], None, 1, options, SilentReporter())
    captions = {open_picture_sets([val], SilentReporter())[0].caption(i) for i in range(24)}
    assert own["num_captions"] == len(captions)
    assert {one["results"][0]["caption"] for one in own["pictures"]} <= captions
    (tmp_path / "captions.txt").write_text("a red circle\n\na blue square\na red circle\n")
    assert clip_answers.tag([val], str(tmp_path / "captions.txt"), 9, options, SilentReporter())["num_captions"] == 2
    others = clip_answers.tag([val], str(scenes / "train-000000.tar"), 1, options, SilentReporter())
    assert others["num_captions"] > 2
    (tmp_path / "words").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "words" / "a.png")
    (tmp_path / "words" / "a.txt").write_text("a black square")
    from_folder = clip_answers.tag([val], str(tmp_path / "words"), 1, options, SilentReporter())
    assert from_folder["pictures"][0]["results"][0]["caption"] == "a black square"


def test_an_answer_is_the_statement_that_is_nearest(val: str, options: ClipOptions) -> None:
    question, answers = "What colour is the circle?", ["red", "green", "blue"]
    result = clip_answers.ask(val, question, ",".join(answers), options, SilentReporter())
    clip = Clip(options, SilentReporter())
    images, _ = clip.pictures(open_picture_sets([val], SilentReporter()))
    cosines = images @ clip.texts([statement(question, answer) for answer in answers]).T
    assert [one["results"][0]["answer"] for one in result["pictures"]] == [answers[i] for i in cosines.argmax(1)]
    assert result["pictures"][0]["results"][0]["statement"].endswith(" circle")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Four pictures: one with a caption in a .txt, one in a .caption, two without."""
    (tmp_path / "pairs").mkdir()
    for i, color in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (40, 32), color).save(tmp_path / f"pairs/{i}.png")
    (tmp_path / "pairs/0.txt").write_text(" a red\ncircle \n")
    (tmp_path / "pairs/2.caption").write_text("a blue square")
    return tmp_path / "pairs"


def test_scores_are_cosines_of_pictures_and_their_own_captions(
    pairs: Path, options: ClipOptions, features: CLIPFeatures
) -> None:
    reporter = SilentReporter()
    result = clip_answers.score([str(pairs)], None, options, reporter)
    assert [(one["name"], one["caption"]) for one in result["pictures"]] == [
        ("0.png", "a red circle"),
        ("2.png", "a blue square"),
    ]
    assert "warning: 2 pictures without a caption are left out" in reporter.messages
    pictures = open_picture_sets([str(pairs)], reporter)[0]
    images = features.pictures([pictures.picture(0), pictures.picture(2)])
    cosines = F.cosine_similarity(images, features.texts(["a red circle", "a blue square"])).tolist()
    assert [one["cosine"] for one in result["pictures"]] == pytest.approx(cosines, abs=1e-5)
    assert [one["clipscore_hessel"] for one in result["pictures"]] == pytest.approx(
        [2.5 * max(0.0, cosine) for cosine in cosines], abs=1e-5
    )
    assert result["mean_cosine"] == pytest.approx(sum(cosines) / 2, abs=1e-5)


def test_the_lowest_scores_are_drawn(pairs: Path, options: ClipOptions, tmp_path: Path) -> None:
    sheet = tmp_path / "lowest.png"
    result = clip_answers.score([str(pairs)], None, options, SilentReporter(), top=1, sheet=sheet)
    lowest = min(result["pictures"], key=lambda one: float(one["cosine"]))["name"]
    drawn, picture = (np.asarray(Image.open(file)) for file in (sheet, pairs / lowest))
    height, width = picture.shape[:2]
    assert (drawn[-height:, -width:] == picture).all()
    with pytest.raises(OutputError):
        clip_answers.score([str(pairs)], None, options, SilentReporter(), sheet=sheet)


def test_one_caption_may_be_given_for_all_and_none_at_all_is_refused(pairs: Path, options: ClipOptions) -> None:
    assert clip_answers.score([str(pairs)], "a circle", options, SilentReporter())["num_samples"] == 4
    with pytest.raises(DataError, match="no picture has a caption"):
        clip_answers.score([str(pairs / "1.png")], None, options, SilentReporter())


def test_generated_pictures_have_their_prompts_for_captions(pairs: Path, options: ClipOptions) -> None:
    images = [{"file": f"{i}.png", "prompt": f"a {name}"} for i, name in enumerate(LABELS)]
    (pairs / "images.json").write_text(json.dumps({"job": {"model": "x"}, "images": images}))
    result = clip_answers.score([str(pairs)], None, options, SilentReporter())
    assert [one["caption"] for one in result["pictures"]] == ["a circle", "a square", "a ring"]


def test_pictures_are_upright_and_transparent_parts_are_white(tmp_path: Path) -> None:
    half = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    half.paste((255, 0, 0, 255), (0, 0, 2, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    half.save(tmp_path / "x.png", exif=exif)
    found = open_picture_sets([str(tmp_path / "x.png")], SilentReporter())[0].picture(0)
    assert found.shape == (3, 4, 2)
    assert found[:, :2].unique(dim=1).flatten(1)[:, 0].tolist() == [255, 0, 0]
    assert bool((found[:, 2:] == 255).all())


def test_texts_are_between_commas_or_lines_of_a_file(tmp_path: Path) -> None:
    assert texts_of(" a , b,,a", "--labels") == ["a", "b"]
    (tmp_path / "x").write_text("a, b\n\nc\n")
    assert texts_of(str(tmp_path / "x"), "--labels") == ["a, b", "c"]
    with pytest.raises(DataError, match="--labels ',' has no text"):
        texts_of(",", "--labels")
    many = [f"label number {number}" for number in range(100)]
    assert texts_of(",".join(many), "--labels") == many
    with pytest.raises(InputNotFoundError, match=r"--labels: there is no 'labels\.txt'"):
        texts_of("labels.txt", "--labels")


def test_pictures_or_texts_are_embedded_and_not_both(val: str, options: ClipOptions, tmp_path: Path) -> None:
    out = tmp_path / "x.npy"
    for sources, texts in (([], None), ([val], "a")):
        with pytest.raises(UsageError):
            clip_embed.run(sources, texts, out, options, SilentReporter())
    with pytest.raises(UsageError, match=r"ends with neither \.npy nor \.safetensors"):
        clip_embed.run([val], None, tmp_path / "x.bin", options, SilentReporter())
    clip_embed.run([], "a,b", out, options, SilentReporter(), half=True)
    assert (np.load(out).shape, np.load(out).dtype) == ((2, 16), np.float16)


def test_a_text_of_that_name_is_not_replaced_unasked(options: ClipOptions, tmp_path: Path) -> None:
    for suffix in (".json", ".names.jsonl"):
        (tmp_path / f"mine{suffix}").write_text("{}")
        with pytest.raises(OutputError, match=suffix):
            clip_embed.run([], "a", tmp_path / "mine.npy", options, SilentReporter())
        (tmp_path / f"mine{suffix}").unlink()
