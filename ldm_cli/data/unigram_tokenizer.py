"""T5's tokenizer: a unigram model (Kudo 2018, arXiv:1804.10959), from files of transformers or SentencePiece."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from ldm_cli.data.tokenizer import Tokens
from ldm_cli.data.tokenizer_files import MOST_TOKENIZER_BYTES
from ldm_cli.errors import CheckpointError, InputNotFoundError, LdmError, OutputError
from ldm_cli.manifest import read_listed
from ldm_cli.storage import resolve_model_folder

_FILE, _SENTENCEPIECE, _SETTINGS = "tokenizer.json", "spiece.model", "tokenizer_config.json"
_PAD, _END, _UNKNOWN = "<pad>", "</s>", "<unk>"
_SPELLED = re.compile(r"<(pad|/s|unk)>")


class UnigramTokenizer:
    """Texts to token ids, each followed by the end token.

    Attributes:
        vocab_size: rows an embedding needs.
        end_id, pad_id: ids of the special tokens.

    Raises:
        ValueError: the tokenizer is of another kind, or has no end or padding token.
    """

    def __init__(self, encoder: tokenizers.Tokenizer) -> None:
        if not isinstance(encoder.model, models.Unigram):
            raise ValueError(f"its model is {type(encoder.model).__name__}, not Unigram")
        vocab: dict[str, int] = encoder.get_vocab(with_added_tokens=True)
        if missing := [token for token in (_PAD, _END) if token not in vocab]:
            raise ValueError(f"it has no token {' and no '.join(missing)}")
        encoder.no_padding()
        encoder.no_truncation()
        self._encoder = encoder
        self.pad_id, self.end_id = vocab[_PAD], vocab[_END]
        self.vocab_size = max(vocab.values()) + 1

    @classmethod
    def load(cls, folder: Path) -> UnigramTokenizer:
        """Read `tokenizer.json`, or else `spiece.model`.

        Raises:
            InputNotFoundError: neither is there.
            CheckpointError: it is no T5 tokenizer, or damaged.
        """
        folder = resolve_model_folder(folder)
        files = [file for name in (_FILE, _SENTENCEPIECE) if (file := folder / name).is_file()]
        if not files:
            raise InputNotFoundError(f"no tokenizer in '{folder}'", f"neither {_FILE} nor {_SENTENCEPIECE}")
        try:
            content = read_listed(files[0], MOST_TOKENIZER_BYTES)
            if files[0].name == _SENTENCEPIECE:
                return cls(_of_sentencepiece(content))
            return cls(tokenizers.Tokenizer.from_str(content.decode()))
        except LdmError:
            raise
        except Exception as error:  # `tokenizers` reports every fault of its input as a plain Exception
            raise CheckpointError(f"'{files[0]}' is no T5 tokenizer", f"{type(error).__name__}: {error}") from error

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides which ids a text gets."""
        return hashlib.sha256(self._encoder.to_str().encode()).hexdigest()

    def save(self, folder: Path, length: int) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which open as `T5TokenizerFast` in transformers.

        Args:
            folder: is made.
            length: tokens per text, for information.

        Raises:
            OutputError: a file cannot be written.
        """
        settings = {
            "tokenizer_class": "T5TokenizerFast",
            "model_max_length": length,
            "pad_token": _PAD,
            "eos_token": _END,
            "unk_token": _UNKNOWN,
            "extra_ids": 0,
            "additional_special_tokens": [],
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / _FILE).write_text(self._encoder.to_str(pretty=True) + "\n", encoding="utf-8")
            (folder / _SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot write tokenizer '{folder}'", error.strerror or str(error)) from error

    def encode(self, texts: Sequence[str], length: int) -> Tokens:
        """Token ids of texts, each ended and padded.

        Args:
            texts: any strings; special tokens spelled out in them are taken apart.
            length: L, at least 1. A longer text is cut, and ended all the same.
        """
        safe = [_SPELLED.sub(r"< \1>", text) for text in texts]
        return Tokens.framed(self._encoder, safe, length, (), self.end_id, self.pad_id)


def _of_sentencepiece(content: bytes) -> tokenizers.Tokenizer:
    """The tokenizer of a SentencePiece model file, a ModelProto of protocol buffers (sentencepiece_model.proto)."""
    pieces: list[tuple[str, float]] = []
    charsmap = b""
    unknown = 0
    for field, value in _fields(content):
        if field == 1:
            piece = dict(_fields(value))
            pieces.append((piece.get(1, b"").decode(), struct.unpack("<f", piece.get(2, bytes(4)))[0]))
            # A piece's type is NORMAL where it is not said; UNKNOWN is 2.
            if piece.get(3) == b"\x02":
                unknown = len(pieces) - 1
        elif field == 3:
            charsmap = dict(_fields(value)).get(2, b"")
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unknown, False))
    steps: list[normalizers.Normalizer] = [normalizers.Precompiled(charsmap)] if charsmap else []
    steps += [normalizers.Strip(left=False, right=True), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    tokenizer.add_special_tokens(
        [token for token in (_PAD, _END, _UNKNOWN) if tokenizer.token_to_id(token) is not None]
    )
    end = tokenizer.token_to_id(_END)
    if end is not None:
        tokenizer.post_processor = processors.TemplateProcessing(f"$A {_END}", f"$A {_END} $B {_END}", [(_END, end)])
    return tokenizer


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """The fields of a message: number and bytes; a varint's bytes are its last ones, enough for small numbers."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 0:
            _, end = _varint(message, at)
        elif kind == 2:
            length, at = _varint(message, at)
            end = at + length
        elif kind in (1, 5):
            end = at + (8 if kind == 1 else 4)
        else:
            raise ValueError(f"byte {at}: no field of a SentencePiece model")
        if end > len(message):
            raise ValueError("the file ends in the middle of a field")
        yield key >> 3, message[at:end]
        at = end


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A variable-length integer and where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
