"""The tokenizer: training, the vocabulary's order, truncation, hostile captions, files."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from ldm_cli.data.tokenizer import Tokenizer, defused
from ldm_cli.data.tokenizer_config import MIN_VOCAB_SIZE, TokenizerConfig
from ldm_cli.errors import CheckpointError, InputNotFoundError

CAPTIONS = [f"a {size} {color} {shape}" for size in ("small", "large") for color in ("red", "blue", "green")
            for shape in ("circle", "square", "star")]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(CAPTIONS, TokenizerConfig(vocab_size=600))


def vocabulary(tokenizer: Tokenizer, folder: Path) -> dict[str, int]:
    tokenizer.save(folder)
    result: dict[str, int] = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    return result


def test_the_vocabulary_is_in_openai_order(tokenizer: Tokenizer, tmp_path: Path) -> None:
    vocab = vocabulary(tokenizer, tmp_path)
    names = list(vocab)
    assert list(vocab.values()) == list(range(len(vocab)))
    assert names[:3] == ["!", '"', "#"]
    assert names[187] == "ÿ"
    assert names[188] == "Ā"  # byte 0 is the first unprintable one
    assert names[256:512] == [name + "</w>" for name in names[:256]]
    assert names[-2:] == ["<|startoftext|>", "<|endoftext|>"]
    merges = (tmp_path / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert merges[0] == "#version: 0.2"
    assert names[512:-2] == [line.replace(" ", "") for line in merges[1:]]
    assert tokenizer.end_id == tokenizer.vocab_size - 1


def test_training_merges_the_most_frequent_pair_first(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["abab abab xy"], TokenizerConfig(vocab_size=MIN_VOCAB_SIZE + 1))
    assert list(vocabulary(tokenizer, tmp_path))[512] == "ab"  # 2 inner pairs; "ab</w>" also twice, but later in order


def test_vocabulary_is_as_large_as_asked_or_as_captions_allow() -> None:
    assert Tokenizer.train(CAPTIONS, TokenizerConfig(vocab_size=530)).vocab_size == 530
    assert Tokenizer.train([], TokenizerConfig(vocab_size=600)).vocab_size == MIN_VOCAB_SIZE
    saturated = Tokenizer.train(CAPTIONS, TokenizerConfig(vocab_size=10_000))
    assert saturated.vocab_size < 600
    assert saturated.encode(["small red circle"]).num_tokens == (5,)  # every word is one token by then


def test_captions_in_any_order_and_any_process_give_the_same_vocabulary(tmp_path: Path) -> None:
    generator = random.Random(1)
    # Random words, each once: most pairs are equally frequent, and ties decide nearly every merge.
    captions = ["".join(generator.choices("abcdefgh", k=6)) for _ in range(300)]
    expected = vocabulary(Tokenizer.train(captions, TokenizerConfig(vocab_size=900)), tmp_path)
    code = (
        "import sys, json; from pathlib import Path\n"
        "from ldm_cli.data.tokenizer import Tokenizer\n"
        "from ldm_cli.data.tokenizer_config import TokenizerConfig\n"
        "for order in ('same', 'other'):\n"
        "    folder = Path(sys.argv[1], order)\n"
        "    captions = json.loads((folder / 'captions.json').read_text())\n"
        "    Tokenizer.train(captions, TokenizerConfig(vocab_size=900)).save(folder)"
    )
    orders = {"same": captions, "other": generator.sample(captions, len(captions))}
    for name, order in orders.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "captions.json").write_text(json.dumps(order))
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    for name in orders:
        assert json.loads((tmp_path / name / "vocab.json").read_text(encoding="utf-8")) == expected


def test_only_the_first_captions_are_trained_on() -> None:
    config = TokenizerConfig(vocab_size=600, max_captions=1)
    assert Tokenizer.train(["ab", "cd cd cd"], config).vocab_size == MIN_VOCAB_SIZE + 1


def test_too_small_a_vocabulary_is_refused_with_the_least_size() -> None:
    with pytest.raises(ValueError, match="514"):
        TokenizerConfig(vocab_size=513)


def test_texts_are_framed_and_padded(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(["a red star", ""], length=8)
    assert tokens.input_ids.shape == (2, 8)
    assert tokens.input_ids[:, 0].tolist() == [tokenizer.start_id] * 2
    assert tokens.input_ids[1].tolist() == [tokenizer.start_id] + [tokenizer.end_id] * 7
    assert tokens.num_tokens[1] == 2
    assert tokens.input_ids[0, tokens.num_tokens[0] - 1] == tokenizer.end_id
    assert tokens.truncated == ()


def test_truncation_keeps_the_frame_and_reports_the_text_it_dropped(tokenizer: Tokenizer) -> None:
    whole = "a red star  on a Blue square"
    for length in range(2, 12):
        tokens = tokenizer.encode(["a star", whole], length=length)
        row = tokens.input_ids[1].tolist()
        assert (row[0], row[tokens.num_tokens[1] - 1]) == (tokenizer.start_id, tokenizer.end_id)
        dropped = dict(tokens.truncated).get(1, "")
        assert whole.endswith(dropped)
        kept = whole[: len(whole) - len(dropped)]
        assert tokenizer.decode(row).replace(" ", "") == kept.lower().replace(" ", "")
    assert dict(tokens.truncated) == {}


def test_length_without_room_for_the_frame_is_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="length=1"):
        tokenizer.encode(["a"], length=1)


@pytest.mark.parametrize("text", ["a <|endoftext|> b", "<|STARTOFTEXT|>", "x<|endoftext|><|endoftext|>y"])
def test_a_caption_cannot_spell_a_special_token(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode([text])
    inner = tokens.input_ids[0, 1 : tokens.num_tokens[0] - 1].tolist()
    assert inner
    assert not {tokenizer.start_id, tokenizer.end_id} & set(inner)


def test_lone_surrogates_become_question_marks(tokenizer: Tokenizer) -> None:
    assert defused("a\udcffb") == "a?b"
    assert tokenizer.encode(["a\udcffb"]).input_ids.equal(tokenizer.encode(["a?b"]).input_ids)


@pytest.mark.parametrize("text", ["a small red circle", "naïve 猫 🙂 x", "it's 42 ! ?"])
def test_decoding_returns_the_text(tokenizer: Tokenizer, text: str) -> None:
    decoded = tokenizer.decode(tokenizer.encode([text]).input_ids[0].tolist())
    assert decoded.replace(" ", "") == text.replace(" ", "")


def test_saved_and_loaded_is_the_same_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "new" / "folder")
    loaded = Tokenizer.load(tmp_path / "new" / "folder")
    texts = ["a small red circle", "Ünïcode 猫!"]
    assert loaded.encode(texts).input_ids.equal(tokenizer.encode(texts).input_ids)
    loaded.save(tmp_path / "again")
    for file in (tmp_path / "new" / "folder").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_tokenizer_json_alone_is_enough(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
        (tmp_path / name).unlink()
    texts = ["a small red circle", "猫"]
    assert Tokenizer.load(tmp_path).encode(texts).input_ids.equal(tokenizer.encode(texts).input_ids)


def test_padding_token_is_read_from_the_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "special_tokens_map.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": {"content": "!"}, "model_max_length": 5}')
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.pad_id, loaded.model_max_length) == (0, 5)
    assert loaded.encode([""]).input_ids.tolist() == [[loaded.start_id, loaded.end_id, 0, 0, 0]]


def test_missing_files_are_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match=r"vocab\.json"):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    for name in ("merges.txt", "tokenizer.json"):
        (tmp_path / name).unlink()
    with pytest.raises(InputNotFoundError, match=r"merges\.txt"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", "{"),
        ("vocab.json", "[]"),
        ("vocab.json", '{"a": 0}'),
        ("vocab.json", '{"a": 0, "<|startoftext|>": 0, "<|endoftext|>": 1}'),
        ("vocab.json", '{"a": "0", "<|startoftext|>": 1, "<|endoftext|>": 2}'),
        ("merges.txt", "a b c"),
        ("merges.txt", "nothere neitherhere"),
        ("special_tokens_map.json", '{"bos_token": "<s>"}'),
        ("tokenizer_config.json", '{"padding_side": "left"}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"7": {"content": "sks"}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"9999": {"content": "sks"}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"584": "sks"}, "special_tokens_map": 1}'),
    ],
)
def test_broken_files_are_refused(tokenizer: Tokenizer, tmp_path: Path, name: str, content: str) -> None:
    tokenizer.save(tmp_path)
    for other in {"tokenizer.json", "tokenizer_config.json"} - {name}:
        (tmp_path / other).unlink()
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match="no CLIP tokenizer"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("lost", [1, 2, 5, 40])
@pytest.mark.parametrize("end", ["first", "last"])
@pytest.mark.parametrize("layout", ["vocab.json", "tokenizer.json"])
def test_lost_merges_are_noticed(tokenizer: Tokenizer, tmp_path: Path, lost: int, end: str, layout: str) -> None:
    tokenizer.save(tmp_path)
    part = slice(lost, None) if end == "first" else slice(-lost)
    if layout == "tokenizer.json":
        whole = json.loads((tmp_path / layout).read_text())
        whole["model"]["merges"] = whole["model"]["merges"][part]
        (tmp_path / layout).write_text(json.dumps(whole))
    else:
        (tmp_path / "tokenizer.json").unlink()
        version, *merges = (tmp_path / "merges.txt").read_text(encoding="utf-8").splitlines()
        (tmp_path / "merges.txt").write_text("\n".join([version, *merges[part]]), encoding="utf-8")
    with pytest.raises(CheckpointError, match="merges are cut"):
        Tokenizer.load(tmp_path)


def test_an_id_that_was_changed_leaves_a_gap_that_is_noticed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    vocab = vocabulary(tokenizer, tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    last = max(i for token, i in vocab.items() if not token.startswith("<|"))
    changed = {token: 9000 if i == last else i for token, i in vocab.items()}
    (tmp_path / "vocab.json").write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"no token {last}, though its last one is 9000"):
        Tokenizer.load(tmp_path)
