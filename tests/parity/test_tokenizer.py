"""Our tokenizer against `transformers.CLIPTokenizer` on the same files."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from ldm_cli.data.tokenizer import Tokenizer
from ldm_cli.data.tokenizer_config import TokenizerConfig

transformers = pytest.importorskip("transformers")

NASTY = [
    "",
    " ",
    "\t\n  \r\n",
    "a photo of a cat",
    "A  PHOTO\tof\na CAT.",
    "it's they're I'll we'd I've I'm don't 'tis",
    "1234567890 3.14 1e-4 ½ ² Ⅷ",
    "é e\u0301 ﬁ Å Å ẞ ß İ ı Σίσυφος",
    "猫と犬 안녕하세요 مرحبا שלום",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 ❤️",
    "…—«»\u00a0\u2003\u200b\ufeff",
    "a_b-c/d\\e@f#g$%^&*()[]{}<>|~`",
    "<|start|> <| endoftext |> </w> a</w>b",
    "\x00\x01\x1b[31m\x7f\x85",
    "!!! ! a!b",
    "x" * 10_000,
    "ab c" * 2_500,
    "🙂" * 300,
]


def random_text(seed: int) -> str:
    generator = random.Random(seed)
    pools = ("abcdefg ", "ABC'dst ", "0123 .,!", "éüßñ ", "猫犬 ", "🙂\u200d ", "\u0301\u00a0\t")
    return "".join(generator.choice(generator.choice(pools)) for _ in range(60))


@pytest.mark.parametrize("pad_token", ["<|endoftext|>", "!"])
@pytest.mark.parametrize("files", ["all", "tokenizer.json", "vocab.json and merges.txt"])
def test_ids_equal_those_of_transformers(pad_token: str, files: str, tmp_path: Path) -> None:
    captions = ["a small red circle at the top left", "it's naïve, 猫 100", "they'll see 🙂"] * 3 + NASTY[:10]
    trained = Tokenizer.train(captions, TokenizerConfig(vocab_size=700))
    trained.save(tmp_path)
    if pad_token != "<|endoftext|>":
        config = tmp_path / "tokenizer_config.json"
        text = config.read_text().replace('"pad_token": "<|endoftext|>"', f'"pad_token": "{pad_token}"')
        config.write_text(text)
        Tokenizer.load(tmp_path).save(tmp_path)
    if files != "all":
        for file in tmp_path.iterdir():
            if file.name not in files and file.name != "tokenizer_config.json":
                file.unlink()
    ours, theirs = Tokenizer.load(tmp_path), transformers.CLIPTokenizer.from_pretrained(tmp_path)
    texts = NASTY + [random_text(seed) for seed in range(100)]
    for length in (77, 8):
        expected = theirs(
            texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids
        found = ours.encode(texts, length).input_ids
        wrong = [texts[i][:40] for i in (found != expected).any(1).nonzero().flatten().tolist()]
        assert wrong == []
    assert (len(theirs), theirs.model_max_length) == (ours.vocab_size, 77)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.start_id, ours.end_id, ours.pad_id)


def test_files_written_by_transformers_load(tmp_path: Path) -> None:
    trained = Tokenizer.train(["a small red circle"], TokenizerConfig(vocab_size=600))
    trained.save(tmp_path / "ours")
    transformers.CLIPTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    loaded = Tokenizer.load(tmp_path / "theirs")
    assert loaded.encode(NASTY).input_ids.equal(trained.encode(NASTY).input_ids)
