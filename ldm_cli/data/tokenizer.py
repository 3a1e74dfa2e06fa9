"""CLIP's byte-pair tokenizer: trained from captions, or read from files; equal to
`transformers.CLIPTokenizer`.

Sources: Sennrich, Haddow, Birch 2016, arXiv:1508.07909 (byte-pair encoding); Radford et al. 2021,
arXiv:2103.00020 (the vocabulary's order). Vocabulary: 256 byte characters, the same 256 with `</w>`, the
merges in order, start, end."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from ldm_cli.data.tokenizer_config import MIN_VOCAB_SIZE, TokenizerConfig
from ldm_cli.errors import CheckpointError, InputNotFoundError, OutputError

START, END = "<|startoftext|>", "<|endoftext|>"
CONTEXT_LENGTH = 77
_WORD_END = "</w>"
_PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_SPECIAL = re.compile(r"<\|(startoftext|endoftext)\|>", re.IGNORECASE)


def _byte_characters() -> tuple[str, ...]:
    """The 256 characters that stand for bytes, in the vocabulary's order: printable bytes first, as
    themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return tuple(chr(b) for b in printable) + tuple(chr(256 + i) for i in range(256 - len(printable)))


_ALPHABET = _byte_characters() + tuple(c + _WORD_END for c in _byte_characters())


@dataclass(frozen=True)
class Tokens:
    """Token ids of a batch of texts.

    Attributes:
        input_ids: int64 [B, L]: start, text, end, then padding.
        num_tokens: for each text, tokens before the padding, start and end included; at most L.
        truncated: (index in the batch, the end of the text that found no room), for each text that was too
            long.
    """

    input_ids: Tensor
    num_tokens: tuple[int, ...]
    truncated: tuple[tuple[int, str], ...]


def defused(text: str) -> str:
    """The text with spelled-out special tokens taken apart, so that no caption can end itself, and valid as
    UTF-8.

    >>> defused("a <|endoftext|> b")
    'a <| endoftext |> b'
    """
    return _SPECIAL.sub(r"<| \1 |>", text.encode("utf-8", "replace").decode())


class Tokenizer:
    """Texts to token ids.

    Attributes:
        vocab_size: rows an embedding needs, the highest id + 1; the end token has the highest id in a
            trained vocabulary.
        start_id, end_id, pad_id: ids of the special tokens; padding is the end token unless files say
            otherwise.
        model_max_length: the context length it was made for.
    """

    def __init__(
        self,
        vocab: dict[str, int],
        merges: Sequence[tuple[str, str]],
        pad_token: str = END,
        model_max_length: int = CONTEXT_LENGTH,
    ) -> None:
        """From a vocabulary and its merges.

        Raises:
            ValueError: if a special token is missing from `vocab`, or a merge is not made of its tokens.
        """
        missing = [token for token in (START, END, pad_token) if token not in vocab]
        if missing:
            raise ValueError(f"Tokenizer: special tokens {missing} are not in the vocabulary of {len(vocab)}")
        self._vocab, self._merges, self._pad_token = dict(vocab), tuple(merges), pad_token
        self.vocab_size = max(vocab.values()) + 1
        self.start_id, self.end_id, self.pad_id = vocab[START], vocab[END], vocab[pad_token]
        self.model_max_length = model_max_length
        self._encoder = _pipeline(self._vocab, self._merges)
        if pad_token != END:
            # transformers matches it in texts too: with Stable Diffusion 2, "!" in a prompt is id 0.
            self._encoder.add_special_tokens([_special(pad_token)])

    @classmethod
    def train(cls, captions: Iterable[str], config: TokenizerConfig) -> Tokenizer:
        """Learn merges from captions; the same captions, in any order, give the same vocabulary.

        Args:
            captions: read up to `config.max_captions`.
            config: `vocab_size` is an upper bound; training stops early when nothing is left to merge.
        """
        trainer = trainers.BpeTrainer(
            vocab_size=config.vocab_size,
            # As "special tokens" the alphabet has fixed ids, so ties between merges do not hang on hash
            # order.
            special_tokens=list(_ALPHABET),
            end_of_word_suffix=_WORD_END,
            show_progress=False,
        )
        learner = _pipeline({}, ())
        learner.train_from_iterator((defused(c) for c in islice(captions, config.max_captions)), trainer)
        learned = json.loads(learner.to_str())["model"]["merges"]
        merges = [(left, right) for left, right in learned][: config.vocab_size - MIN_VOCAB_SIZE]
        ordered = (*_ALPHABET, *(left + right for left, right in merges), START, END)
        return cls({token: i for i, token in enumerate(ordered)}, merges)

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read `vocab.json` and `merges.txt`, or else the `tokenizer.json` that is all transformers 5 writes.

        Raises:
            InputNotFoundError: if neither is there.
            CheckpointError: if they are not a CLIP tokenizer.
        """
        folder = Path(folder)
        try:
            vocab, merges = _read_vocabulary(folder)
            settings = _read_settings(folder)
        except OSError as error:
            name = Path(error.filename).name if error.filename else "a file"
            raise InputNotFoundError(
                f"cannot load tokenizer '{folder}'",
                f"{name}: {error.strerror}",
                "give a CLIP tokenizer's folder",
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"'{folder}' is no CLIP tokenizer", f"{type(error).__name__}: {error}") from error
        pad = settings.get("pad_token") or END
        length = settings.get("model_max_length")
        # transformers writes 1e30 where nothing limits the length.
        length = length if isinstance(length, int) and 2 < length <= 2**20 else CONTEXT_LENGTH
        try:
            return cls(vocab, merges, pad["content"] if isinstance(pad, dict) else pad, length)
        except Exception as error:  # `tokenizers` reports every fault of its input as a plain Exception
            raise CheckpointError(f"'{folder}' is no CLIP tokenizer", str(error)) from error

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides which ids a text gets."""
        parts = [sorted(self._vocab.items()), self._merges, self._pad_token]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write `vocab.json`, `merges.txt`, `tokenizer.json`, `tokenizer_config.json` and
        `special_tokens_map.json`.

        Together they open as `CLIPTokenizer` in transformers 4 and 5.

        Raises:
            OutputError: if a file cannot be written.
        """
        folder = Path(folder)
        special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": self._pad_token}
        settings = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": self.model_max_length,
            **special,
            "do_lower_case": True,
            "add_prefix_space": False,
            "errors": "replace",
        }
        by_id = dict(sorted(self._vocab.items(), key=lambda item: item[1]))
        files = {
            "vocab.json": json.dumps(by_id, ensure_ascii=False, indent=0),
            "merges.txt": "\n".join(["#version: 0.2", *(f"{left} {right}" for left, right in self._merges)]),
            "tokenizer.json": self._with_specials().to_str(pretty=True),
            "tokenizer_config.json": json.dumps(settings, indent=2),
            "special_tokens_map.json": json.dumps(special, indent=2),
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (folder / name).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot write tokenizer '{folder}'", error.strerror or str(error)) from error

    def encode(self, texts: Sequence[str], length: int | None = None) -> Tokens:
        """Token ids of texts, each framed by start and end and padded.

        Args:
            texts: any strings; special tokens spelled out in them are taken apart (`defused`).
            length: L, at least 2; None: `model_max_length`.

        Raises:
            ValueError: if `length` leaves no room for start and end.
        """
        length = self.model_max_length if length is None else length
        if length < 2:
            raise ValueError(f"encode: length={length} has no room for 2 tokens, start and end")
        safe = [defused(text) for text in texts]
        encodings = self._encoder.encode_batch(safe, add_special_tokens=False)
        input_ids = torch.full((len(safe), length), self.pad_id, dtype=torch.int64)
        num_tokens, truncated = [], []
        for i, (text, encoding) in enumerate(zip(safe, encodings, strict=True)):
            ids = [self.start_id, *encoding.ids[: length - 2], self.end_id]
            input_ids[i, : len(ids)] = torch.tensor(ids)
            num_tokens.append(len(ids))
            if len(encoding.ids) > length - 2:
                truncated.append((i, text[encoding.offsets[length - 2][0] :]))
        return Tokens(input_ids, tuple(num_tokens), tuple(truncated))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, lower-case and with single blanks; special tokens are left out."""
        by_id = {i: token for token, i in self._vocab.items()}
        left_out = {self.start_id, self.end_id, self.pad_id}
        text: str = decoders.ByteLevel().decode([by_id[i] for i in ids if i not in left_out])
        return text.replace(_WORD_END, " ").strip()

    def _with_specials(self) -> tokenizers.Tokenizer:
        """The pipeline as transformers has it, special tokens and all."""
        pipeline = _pipeline(self._vocab, self._merges)
        names = dict.fromkeys((START, END, self._pad_token))
        pipeline.add_special_tokens([_special(name) for name in names])
        end, start = (END, self.end_id), (START, self.start_id)
        pipeline.post_processor = processors.RobertaProcessing(end, start, False, False)
        pipeline.decoder = decoders.ByteLevel()
        return pipeline


def _special(token: str) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(token, normalized=False, special=True)


def _pipeline(vocab: dict[str, int], merges: Sequence[tuple[str, str]]) -> tokenizers.Tokenizer:
    """CLIP's normalisation, splitting and merging, without special tokens."""
    model = models.BPE(
        vocab=vocab,
        merges=list(merges),
        unk_token=END,
        continuing_subword_prefix="",
        end_of_word_suffix=_WORD_END,
        fuse_unk=False,
    )
    pipeline = tokenizers.Tokenizer(model)
    pipeline.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return pipeline


def _read_object(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds a {type(content).__name__}, not an object")
    return content


def _read_settings(folder: Path) -> dict[str, Any]:
    """What the optional files say; tokenizer_config.json has the last word, as in transformers."""
    files = [folder / name for name in ("special_tokens_map.json", "tokenizer_config.json")]
    return {key: value for file in files if file.exists() for key, value in _read_object(file).items()}


def _read_vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokens with their ids, and the merges in order.

    Raises:
        OSError, ValueError, KeyError, TypeError: if files are missing or not what they should be.
    """
    if (folder / "tokenizer.json").exists() and not (folder / "vocab.json").exists():
        model = _read_object(folder / "tokenizer.json")["model"]
        vocab: dict[str, int] = model["vocab"]
        pairs = [pair.split() if isinstance(pair, str) else pair for pair in model["merges"]]
    else:
        vocab = _read_object(folder / "vocab.json")
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        pairs = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError("one of its merges is not two tokens")
    if not all(type(i) is int for i in vocab.values()) or len(set(vocab.values())) != len(vocab):
        raise ValueError("its ids are not whole numbers, each used once")
    return vocab, [(left, right) for left, right in pairs]
