import json
import re

import pytest
from PIL import Image

from ldm_cli.errors import DataError, InputNotFoundError
from ldm_cli.formats.png_metadata import exif, format_parameters, png_chunks, read_provenance
from tests.formats.web_ui import parse_parameters

FIELDS = {"Steps": 20, "Sampler": "DPM++ 2M", "CFG scale": 7.0, "Seed": 1, "Size": "512x512", "Nothing": None}
# The pattern of AUTOMATIC1111's web UI (modules/infotext_utils.py), by which others read its pictures.
THEIRS = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def write(path, texts):
    image = Image.new("RGB", (4, 3))
    if path.suffix == ".png":
        image.save(path, pnginfo=png_chunks(texts))
    else:
        image.save(path, exif=exif(texts))
    return path


@pytest.mark.parametrize("prompt", ["a cat", "é 猫 😀", "a, b: c", "two\nlines", "Steps: 3", ""])
@pytest.mark.parametrize("negative", ["", "dog, bird: no", "two\nlines"])
def test_parameters_are_read_back_as_they_were_written(prompt, negative):
    text = format_parameters(prompt, negative, FIELDS)
    found = parse_parameters(text)
    assert found.pop("Prompt") == prompt
    assert found.pop("Negative prompt") == negative
    assert found == {name: str(value) for name, value in FIELDS.items() if value is not None}
    last = dict(THEIRS.findall(text.split("\n")[-1]))
    assert last["Steps"] == "20"
    assert last["Sampler"] == "DPM++ 2M"


def test_values_with_separators_are_quoted_and_fewer_than_three_fields_are_prompt():
    assert 'Model: "a, b: c"' in format_parameters("x", "", {"Model": "a, b: c"})
    assert parse_parameters(format_parameters("x", "", {**FIELDS, "Model": 'a, "b": c\n'}))["Model"] == 'a, "b": c\n'
    assert parse_parameters("a cat\nSteps: 20, Seed: 1")["Prompt"] == "a cat\nSteps: 20, Seed: 1"


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_every_format_keeps_our_record_and_the_parameters(tmp_path, suffix):
    record = {"prompt": "é 猫 😀\x1b", "seed": 3}
    parameters = format_parameters(record["prompt"], "", FIELDS)
    path = write(tmp_path / f"a{suffix}", {"parameters": parameters, "ldm_cli": json.dumps(record, ensure_ascii=False)})
    assert read_provenance(path) == record
    with Image.open(path) as image:
        if suffix == ".png":
            assert image.text["parameters"] == parameters
        else:
            comment = image.getexif().get_ifd(0x8769)[0x9286]
            assert comment[:8] == b"UNICODE\0"
            assert comment[8:].decode("utf-16-be") == parameters


def test_what_no_jpeg_can_hold_is_left_out_rather_than_the_picture(tmp_path):
    long = "x" * 100_000
    path = write(tmp_path / "a.jpg", {"parameters": long, "ldm_cli": json.dumps({"prompt": long})})
    with pytest.raises(DataError, match="does not say how it was made"):
        read_provenance(path)


def test_foreign_and_broken_files_are_told_apart(tmp_path):
    with pytest.raises(InputNotFoundError):
        read_provenance(tmp_path / "none.png")
    with pytest.raises(DataError, match="does not say"):
        read_provenance(write(tmp_path / "a.png", {"parameters": "x"}))
    with pytest.raises(DataError, match="does not say"):
        read_provenance(write(tmp_path / "b.png", {"ldm_cli": "[1]"}))
    with pytest.raises(DataError, match="cannot read"):
        read_provenance(write(tmp_path / "c.png", {"ldm_cli": "{"}))
    (tmp_path / "d.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(DataError, match="cannot read"):
        read_provenance(tmp_path / "d.png")
