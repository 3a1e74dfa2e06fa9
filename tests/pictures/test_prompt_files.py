import json

import pytest

from ldm_cli.core.diffusion.config import GuidanceConfig
from ldm_cli.errors import DataError, InputNotFoundError, UsageError
from ldm_cli.pictures.job import make_job
from ldm_cli.pictures.prompt_files import read_prompt_file
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.edit_config import EditConfig


def read(path, data, warnings=None):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    entries = read_prompt_file(path, (warnings if warnings is not None else []).append)
    return [(entry.prompt, entry.sampling) for entry in entries]


def path_of(folder, text):
    (folder / "entries.json").write_text(text)
    return folder / "entries.json"


def test_text_lines_take_the_options_of_kohya(tmp_path):
    text = (
        "# a comment\n\n a cat --n a dog, bird --w 64 --h 32 --d 7 --s 30 --l 7.5 --ss euler_a \r\na -- plain - line\n"
        "a dog --w=64 --d =7\n"
    )
    assert read(tmp_path / "p.txt", text) == [
        (
            "a cat",
            {
                "negative": "a dog, bird",
                "width": 64,
                "height": 32,
                "seed": 7,
                "steps": 30,
                "guidance.scale": 7.5,
                "sampler": "euler_ancestral",
            },
        ),
        ("a -- plain - line", {}),
        ("a dog", {"width": 64, "seed": 7}),
    ]


def test_json_lines_and_csv_say_the_same(tmp_path):
    line = {"prompt": 'a "cat", sitting', "negative_prompt": "1", "num_inference_steps": 30, "guidance_scale": 3}
    expected = [('a "cat", sitting', {"negative": "1", "steps": 30, "guidance.scale": 3})]
    assert read(tmp_path / "p.jsonl", json.dumps(line) + "\n\n") == expected
    table = '\ufeffprompt,negative,steps,scale,seed\n"a ""cat"", sitting",1,30,3,\n'
    assert read(tmp_path / "p.csv", table) == expected


def test_guidance_is_a_scale_as_a_number_and_the_section_as_an_object(tmp_path):
    assert read(tmp_path / "p.json", '[{"prompt": "a", "guidance": 3}]') == [("a", {"guidance.scale": 3})]
    (entry,) = read_prompt_file(path_of(tmp_path, '[{"prompt": "a", "guidance": {"scale": 2, "rescale": 0.5}}]'), print)
    (item,) = make_job([entry], SamplingConfig(images_per_prompt=1), EditConfig()).items
    assert item.sampling.guidance == GuidanceConfig(scale=2.0, rescale=0.5)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "a cat --ss k_euler_a"),
        ("p.json", '[{"prompt": "a cat", "sampler": "euler_a"}]'),
        ("p.jsonl", '{"prompt": "a cat", "sampler": "k_euler_a"}'),
        ("p.csv", "prompt,sampler\na cat,euler_a\n"),
    ],
)
def test_samplers_go_by_their_other_names_in_every_kind_of_file(tmp_path, name, text):
    assert read(tmp_path / name, text) == [("a cat", {"sampler": "euler_ancestral"})]


def test_a_sampler_that_is_no_text_is_left_to_the_job(tmp_path):
    assert read(tmp_path / "p.json", '[{"prompt": "a", "sampler": ["euler_a"]}]') == [("a", {"sampler": ["euler_a"]})]


@pytest.mark.parametrize(
    ("name", "data", "warning"),
    [
        ("p.txt", "caf\u00e9\nb".encode("cp1252"), "1 × Windows-1252 text"),
        ("p.txt", "caf\u00e9\r\nb\r\n".encode("utf-16"), "1 × UTF-16 text"),
        ("p", "caf\u00e9\nb\n".encode("utf-16-le"), "1 × UTF-16 text"),
        ("p.prompts", "caf\u00e9\n\nb".encode("utf-8-sig"), None),
        ("p.json", b'["caf\\u00e9", "b"]', None),
        ("p.JSON", b'{"prompts": [{"prompt": "caf\\u00e9"}, "b"]}', None),
        ("p.ndjson", '{"prompt": "caf\u00e9"}\n{"prompt": "b"}'.encode("utf-16"), "1 × UTF-16 text"),
        ("p.tsv", "Prompt\tseed\ncaf\u00e9\t\nb\t\n".encode(), None),
        ("p.csv", "seed;prompt\nNaN;caf\u00e9\n;b\n".encode(), None),
        ("p.csv", "seed\tprompt\n\tcaf\u00e9\n\tb\n".encode("utf-16"), "1 × UTF-16 text"),
    ],
)
def test_prompts_are_the_same_in_every_kind_and_encoding(tmp_path, name, data, warning):
    warnings = []
    assert read(tmp_path / name, data, warnings) == [("caf\u00e9", {}), ("b", {})]
    assert warnings == ([f"'{tmp_path / name}': {warning}"] if warning else [])


@pytest.mark.parametrize("name", ["p.yaml", "p.parquet", "p.xlsx", "p.docx", "p.png", "p.toml", "p.html"])
def test_a_file_of_another_kind_is_refused_by_its_kind(tmp_path, name):
    with pytest.raises(DataError, match=f"{name[1:]} is no kind of prompt file"):
        read(tmp_path / name, "- a cat\n")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b'["a cat", "a dog"]', "JSON"),
        (b'{"prompt": "a cat"}\n{"prompt": "a dog"}\n', "JSON"),
        (b'[\n  {"prompt": "a cat"}\n]', "JSON"),
        (b"prompt,seed\na cat,1\n", "a table"),
        (b"{\\rtf1 a cat}", "markup"),
        (b"<!DOCTYPE html>\n<p>a cat", "markup"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0", "no text"),
        (b"PK\x03\x04\x14\0\x06\0\x08", "no text"),
        (b"\x1f\x8b\x08\x01\x02", "no text"),
        (b"<svg xmlns='x'>\n", "markup"),
        (b"<?php echo 1;\n", "markup"),
        (b"prompt;seed\na cat;1\n", "a table"),
        (b"'text'|'prompt'\n'a cat'|'b'\n", "a table"),
        (b"---\nprompts:\n  - a cat\n", "YAML"),
        (b"prompt: a cat\nseed: 3\n", "YAML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (b"a cat\nNegative prompt: bad\nSteps: 20, Sampler: Euler a\n", "the settings of a picture"),
        (b"a cat\nSteps: 20, Sampler: Euler a, CFG scale: 7\n", "the settings of a picture"),
    ],
)
def test_a_text_file_of_other_content_is_refused(tmp_path, data, kind):
    with pytest.raises(DataError, match=f"its content is {kind}"):
        read(tmp_path / "p.txt", data)


@pytest.mark.parametrize("line", ["a cat -w 64", "a cat \u2014h 512", "a cat -seed=3", "-s 30 a cat"])
def test_words_that_look_like_options_are_warned_of_once(tmp_path, line):
    warnings = []
    assert read(tmp_path / "p.txt", f"{line}\n{line}\n", warnings) == [(line, {})] * 2
    assert len(warnings) == 1
    assert "is part of the prompt" in warnings[0]
    assert read(tmp_path / "q.txt", "a well-w 3 cat - n -- x\n", warnings)
    assert len(warnings) == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "a cat --rm -rf", r"p\.txt:1: unknown option --rm"),
        ("p.txt", "a cat\n--w 64\n", r"p\.txt:2: options without a prompt"),
        ("p.json", "[1]", "entry 1: expected a prompt"),
        ("p.json", '"a cat"', "expected a list"),
        ("p.json", "[", "not JSON"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt":', r"p\.jsonl:2: Expecting value \["),
        ("p.jsonl", "[" * 100_000, r"p\.jsonl:1: maximum recursion"),
        ("p.jsonl", '["a"]', r"p\.jsonl:1: it is no JSON object"),
        ("p.jsonl", '{"steps": 3}', r"p\.jsonl:1: no text under 'prompt'"),
        ("p.csv", "prompt,seed\na,b,c\n", r"p\.csv:2: it has not the 2 columns"),
        ("p.csv", "text\na\n", r"p\.csv:2: no text under 'prompt'"),
    ],
)
def test_what_cannot_be_understood_is_named_with_its_line(tmp_path, name, text, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path / name, text)


def test_hostile_texts_stay_texts(tmp_path):
    hostile = ["../../etc/passwd", "\x1b[31m", "x" * 10_000, "a\u202eb", "\\(", "{a|b}"]
    lines = "\n".join(json.dumps({"prompt": text}) for text in hostile)
    assert [prompt for prompt, _ in read(tmp_path / "p.jsonl", lines)] == hostile
    assert read(tmp_path / "p.jsonl", '{"prompt": "\\ud800"}')[0][0] == "?"
    with pytest.raises(InputNotFoundError):
        read_prompt_file(tmp_path / "none.txt", print)


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("p.jsonl", '{"prompt": "a", "seed": NaN}', ":1:"),
        ("p.json", '["a", {"prompt": "b", "guidance": Infinity}]', "entry 2"),
        ("p.csv", "prompt,eta\na,-Infinity\n", ":2:"),
        ("p.txt", "a --l NaN\n", ":1:"),
    ],
)
def test_a_setting_that_is_not_finite_is_named_with_its_line(tmp_path, name, text, place):
    with pytest.raises(DataError, match=f"{place}.*finite number"):
        read(tmp_path / name, text)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "a\n\n# b\na cat --s many\n", r"p\.txt:4: prompt 'a cat' cannot be: steps: "),
        ("p.txt", "a cat --d -5", r"p\.txt:1: prompt 'a cat' cannot be: seed: "),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b", "steps": "x"}', r"p\.jsonl:2: prompt 'b' cannot be: steps: "),
        ("p.csv", "prompt,stepz\na,\nb,3\n", r"p\.csv:3: prompt 'b': there is no field 'stepz'"),
        ("p.json", '["a", {"prompt": "b", "steps": 0}]', "entry 2: prompt 'b' cannot be"),
        ("p.txt", "a\nb --ss ddimm", r"p\.txt:2: .*found text 'ddimm' \(did you mean 'ddim'\?\), expected 'ddpm', "),
    ],
)
def test_a_value_that_cannot_be_is_named_with_its_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    entries = read_prompt_file(tmp_path / name, print)
    with pytest.raises(UsageError, match=message):
        make_job(entries, SamplingConfig(), EditConfig())
