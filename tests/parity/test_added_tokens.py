"""Tokens added to CLIP's vocabulary, in every layout of files, against `transformers.CLIPTokenizer`."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ldm_cli.data.tokenizer import Tokenizer
from ldm_cli.data.tokenizer_config import TokenizerConfig
from ldm_cli.errors import CheckpointError

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

CAPTIONS = [
    "a small red circle at the top left",
    "it's naïve, 猫 100",
    "they'll see 🙂",
    "a photo of a toy cat",
    "every good boy does fine",
    "the quick brown fox jumps over the lazy dog",
] * 3
TEXTS = [
    "a <cat-toy> sks",
    "asks sksks SKS <CAT-TOY> <Cat-Toy>",
    "a <cat-toy><cat-toy>sks,sks. <cat-toy",
    "  <cat-toy>   sks  \n sks\t",
    "naïve É 猫 É 猫猫 x猫y",
    "!sks! <pad> <s1> <s2>x ![s]",
    "",
]
PLAIN: list[Any] = ["<cat-toy>", "sks"]
FLAGS: list[Any] = [
    tokenizers.AddedToken("<cat-toy>", lstrip=True, normalized=False),
    tokenizers.AddedToken("sks", single_word=True),
    tokenizers.AddedToken("<s1>", rstrip=True, special=True),
    tokenizers.AddedToken("É", normalized=True),
    tokenizers.AddedToken("猫", normalized=False, lstrip=True, rstrip=True),
]
UPPER: list[Any] = [tokenizers.AddedToken("SKS", normalized=False), tokenizers.AddedToken("SKS toy"), "a"]
TOKENS = {"plain": PLAIN, "flags": FLAGS, "upper case and known": UPPER}


def unlink(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink()


def change(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps({k: v for k, v in (content | values).items() if v is not None}), encoding="utf-8")


def as_transformers_5(folder: Path) -> None:
    unlink(folder, "vocab.json", "merges.txt")


def as_transformers_4(folder: Path) -> None:
    """vocab.json and merges.txt, and the added tokens in tokenizer_config.json and, without flags, on their own."""
    whole = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    decoder = {str(t.pop("id")): t for t in whole["added_tokens"]}
    change(folder / "tokenizer_config.json", added_tokens_decoder=decoder)
    change(folder / "special_tokens_map.json", pad_token="!")  # is not read beside added_tokens_decoder
    added = {t["content"]: int(i) for i, t in decoder.items() if int(i) >= 584}
    change(folder / "added_tokens.json", **added)
    unlink(folder, "tokenizer.json")


def as_early_transformers_4(folder: Path) -> None:
    """Without flags: added_tokens.json and special_tokens_map.json."""
    as_transformers_4(folder)
    change(folder / "tokenizer_config.json", added_tokens_decoder=None, additional_special_tokens=None)
    change(folder / "special_tokens_map.json", additional_special_tokens=["<s1>", "<s2>"])


def as_tokenizer_json_alone(folder: Path) -> None:
    unlink(folder, "vocab.json", "merges.txt", "tokenizer_config.json")


def without_merges(folder: Path) -> None:
    unlink(folder, "merges.txt")


LAYOUTS = [as_transformers_5, as_transformers_4, as_early_transformers_4, as_tokenizer_json_alone, without_merges]


def their_folder(tmp_path: Path, tokens: list[Any]) -> Path:
    """A folder that transformers has written, with `tokens` added, and vocab.json and merges.txt beside it."""
    Tokenizer.train(CAPTIONS, TokenizerConfig(vocab_size=584)).save(tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    theirs.add_tokens(tokens)
    unlink(tmp_path, "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json")
    theirs.save_pretrained(tmp_path)
    return tmp_path


def random_texts() -> list[str]:
    pieces = ["<cat-toy>", "sks", "SKS", "<s1>", "<S1>", "é", "É", "猫", "!", "toy", "a", " ", "  ", ",", "<", "\t"]
    choose = random.Random(0)
    return ["".join(choose.choice(pieces) for _ in range(12)) for _ in range(200)]


def assert_same_ids(folder: Path) -> None:
    ours, theirs = Tokenizer.load(folder), transformers.CLIPTokenizer.from_pretrained(folder)
    for text in TEXTS + random_texts():
        expected = theirs(text, padding="max_length", truncation=True, max_length=40).input_ids
        assert ours.encode([text], 40).input_ids[0].tolist() == expected, text
        assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=True), text
    assert ours.vocab_size == len(theirs)
    assert (ours.start_id, ours.end_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_added_tokens_are_those_of_transformers(layout: Callable[[Path], None], tokens: str, tmp_path: Path) -> None:
    folder = their_folder(tmp_path, TOKENS[tokens])
    layout(folder)
    assert_same_ids(folder)
    Tokenizer.load(folder).save(tmp_path / "again")
    assert_same_ids(tmp_path / "again")
    assert Tokenizer.load(folder).fingerprint == Tokenizer.load(tmp_path / "again").fingerprint


def test_the_textual_inversion_of_two_words(tmp_path: Path) -> None:
    ours = Tokenizer.load(their_folder(tmp_path, PLAIN))
    assert ours.encode(["a <cat-toy> sks"], 5).input_ids.tolist() == [[582, 320, 584, 585, 583]]
    assert ours.vocab_size == 586


SETTINGS: dict[str, dict[str, Any]] = {
    "pad token of the vocabulary": {"pad_token": "!"},
    "pad token of its own": {"pad_token": "<pad>"},
    "extra tokens as a list": {"additional_special_tokens": ["<s1>", "<s2>"]},
    "extra tokens of transformers 5": {"extra_special_tokens": ["<s2>", "<s1>"], "pad_token": "<pad>"},
    "extra tokens by name": {"extra_special_tokens": {"image_token": "<s1>"}},
    "a token of another name": {"image_token": "<s1>", "mask_token": "<s2>"},
    "letters kept": {"do_lower_case": False},
    "blank in front": {"add_prefix_space": True, "add_bos_token": False, "add_eos_token": False},
    "no length": {"model_max_length": 1e30},
    "another class": {"tokenizer_class": "CLIPTokenizerFast", "errors": "strict", "name_or_path": "x"},
}


@pytest.mark.parametrize("whole", [True, False], ids=["tokenizer.json", "vocab.json"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_settings_of_tokenizers_are_read_as_transformers_reads_them(settings: str, whole: bool, tmp_path: Path) -> None:
    trained = Tokenizer.train(CAPTIONS, TokenizerConfig(vocab_size=584))
    trained.save(tmp_path)
    unlink(tmp_path, "special_tokens_map.json", *([] if whole else ["tokenizer.json"]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(SETTINGS[settings]))
    assert_same_ids(tmp_path)
    assert Tokenizer.load(tmp_path).model_max_length == 77


@pytest.mark.parametrize(
    "special",
    [
        {"pad_token": {"content": "!", "lstrip": True, "normalized": True, "rstrip": False, "single_word": False}},
        {"bos_token": {"content": "<|startoftext|>", "lstrip": False, "normalized": True, "rstrip": False}},
        {"additional_special_tokens": ["<s1>", "<s2>"], "pad_token": "<pad>"},
        {"extra_special_tokens": ["<s1>", {"content": "<s2>", "rstrip": True}]},
    ],
)
def test_special_tokens_map_is_read_as_transformers_reads_it(special: dict[str, Any], tmp_path: Path) -> None:
    Tokenizer.train(CAPTIONS, TokenizerConfig(vocab_size=584)).save(tmp_path)
    unlink(tmp_path, "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "<|endoftext|>"}')
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    assert_same_ids(tmp_path)


@pytest.mark.parametrize(
    ("part", "content"),
    [
        ("truncation", {"direction": "Left", "max_length": 9, "strategy": "LongestFirst", "stride": 0}),
        ("truncation", {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}),
        (
            "padding",
            {"direction": "Left", "strategy": {"Fixed": 9}, "pad_id": 0, "pad_type_id": 0, "pad_token": "!",
             "pad_to_multiple_of": None},
        ),
    ],
)  # fmt: skip
def test_the_sides_that_tokenizer_json_names_are_those_of_transformers_or_refused(
    part: str, content: dict[str, Any], tmp_path: Path
) -> None:
    Tokenizer.train(CAPTIONS, TokenizerConfig(vocab_size=584)).save(tmp_path)
    change(tmp_path / "tokenizer.json", **{part: content})
    if content["direction"] == "Right":
        assert_same_ids(tmp_path)
        return
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    assert "left" in (theirs.padding_side, theirs.truncation_side)
    with pytest.raises(CheckpointError, match=f"{part}_side='left'"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"padding_side": "left"}, "padding_side"),
        ({"truncation_side": "left"}, "truncation_side"),
        ({"split_special_tokens": True}, "split_special_tokens"),
        ({"eos_token": {"content": "!"}}, "eos_token"),
    ],
)
def test_a_setting_that_is_not_implemented_is_refused_by_name(
    settings: dict[str, Any], cause: str, tmp_path: Path
) -> None:
    Tokenizer.train(CAPTIONS, TokenizerConfig(vocab_size=584)).save(tmp_path)
    change(tmp_path / "tokenizer_config.json", **settings)
    with pytest.raises(CheckpointError, match=cause):
        Tokenizer.load(tmp_path)
