import json

import pytest

from ldm_cli.errors import DataError, InputNotFoundError
from ldm_cli.pictures.prompt_files import read_prompt_file


def read(path, data, warnings=None):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    entries = read_prompt_file(path, (warnings if warnings is not None else []).append)
    return [(entry.prompt, entry.sampling) for entry in entries]


def test_text_lines_take_the_options_of_kohya(tmp_path):
    text = (
        "# a comment\n\n a cat --n a dog, bird --w 64 --h 32 --d 7 --s 30 --l 7.5 --ss euler_a \r\na -- plain - line\n"
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
    ]


def test_json_lines_and_csv_say_the_same(tmp_path):
    line = {"prompt": 'a "cat", sitting', "negative_prompt": "1", "num_inference_steps": 30, "guidance_scale": 3}
    expected = [('a "cat", sitting', {"negative": "1", "steps": 30, "guidance.scale": 3})]
    assert read(tmp_path / "p.jsonl", json.dumps(line) + "\n\n") == expected
    table = '\ufeffprompt,negative,steps,scale,seed\n"a ""cat"", sitting",1,30,3,\n'
    assert read(tmp_path / "p.csv", table) == expected


def test_lines_that_are_not_utf8_are_read_and_named(tmp_path):
    warnings = []
    assert read(tmp_path / "p.txt", b"ok\nb\xffd\n", warnings) == [("ok", {}), ("b\ufffdd", {})]
    assert len(warnings) == 1
    assert "line 2" in warnings[0]
    assert read(tmp_path / "q.txt", "a \ufffd b".encode(), warnings) == [("a \ufffd b", {})]
    assert len(warnings) == 1, "a replacement character that was written is no error"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "a cat --rm -rf", "line 1: unknown option --rm"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt":', "line 2: not JSON"),
        ("p.jsonl", "[" * 100_000, "line 1: not JSON"),
        ("p.jsonl", '["a"]', "line 1: an object expected"),
        ("p.jsonl", '{"steps": 3}', "line 1: no text under 'prompt'"),
        ("p.csv", "prompt,seed\na,b,c\n", "line 2: more fields"),
        ("p.csv", "text\na\n", "no text under 'prompt'"),
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
