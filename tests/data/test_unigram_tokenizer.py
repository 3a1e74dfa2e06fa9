"""T5's tokenizer against SentencePiece and transformers."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from ldm_cli.data.unigram_tokenizer import UnigramTokenizer
from ldm_cli.errors import CheckpointError, InputNotFoundError

sentencepiece = pytest.importorskip("sentencepiece")

CAPTIONS = [
    "a red circle above a blue star",
    "a large green square on a white background",
    "Ein Kreis, ＡＢＣ ﬁne café naïve",
]
TEXTS = [*CAPTIONS, "  double   spaces ", "unknown ☃ words ﬀ", "", "tabs\tand\nlines"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, folder = io.BytesIO(), tmp_path_factory.mktemp("t5")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS * 20),
        model_writer=model,
        vocab_size=42,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    return folder


def ids(tokenizer: UnigramTokenizer, text: str) -> list[int]:
    tokens = tokenizer.encode([text], 100)
    found: list[int] = tokens.input_ids[0, : tokens.num_tokens[0]].tolist()
    return found


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_sentencepiece(folder: Path, text: str) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    assert ids(UnigramTokenizer.load(folder), text) == [*theirs.encode(text), theirs.eos_id()]


def test_what_is_written_opens_in_transformers_and_again_here(folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = UnigramTokenizer.load(folder)
    ours.save(tmp_path, 77)
    theirs, again = transformers.T5TokenizerFast.from_pretrained(tmp_path), UnigramTokenizer.load(tmp_path)
    assert again.fingerprint == ours.fingerprint
    assert (theirs.model_max_length, len(theirs)) == (77, ours.vocab_size)
    assert (theirs.pad_token_id, theirs.eos_token_id) == (ours.pad_id, ours.end_id)
    for text in TEXTS:
        assert ids(again, text) == ids(ours, text) == theirs(text).input_ids


def test_a_long_text_is_cut_ended_and_reported(folder: Path) -> None:
    tokenizer = UnigramTokenizer.load(folder)
    tokens = tokenizer.encode([CAPTIONS[0], "a"], 5)
    assert tokens.input_ids[0].tolist() == [*ids(tokenizer, CAPTIONS[0])[:4], tokenizer.end_id]
    assert tokens.num_tokens == (5, len(ids(tokenizer, "a")))
    assert (tokens.input_ids[1, tokens.num_tokens[1] :] == tokenizer.pad_id).all()
    ((index, rest),) = tokens.truncated
    assert index == 0
    assert rest
    assert CAPTIONS[0].endswith(rest)


def test_a_caption_cannot_end_itself(folder: Path) -> None:
    tokenizer = UnigramTokenizer.load(folder)
    assert ids(tokenizer, "a </s> b").count(tokenizer.end_id) == 1


def test_what_is_no_t5_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match=r"neither tokenizer.json nor spiece.model"):
        UnigramTokenizer.load(tmp_path)
    whole = (folder / "spiece.model").read_bytes()
    for damaged in (whole[:-7], whole[:900], b"\xff" * 50, b""):
        (tmp_path / "spiece.model").write_bytes(damaged)
        with pytest.raises(CheckpointError, match="is no T5 tokenizer"):
            UnigramTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE"}}))
    with pytest.raises(CheckpointError, match="is no T5 tokenizer"):
        UnigramTokenizer.load(tmp_path)
