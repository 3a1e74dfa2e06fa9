"""CLIP's byte-pair tokenizer: trained from captions, or read from files; equal to `transformers.CLIPTokenizer`.

Sources: Sennrich, Haddow, Birch 2016, arXiv:1508.07909 (byte-pair encoding); Radford et al. 2021,
arXiv:2103.00020 (the vocabulary's order). Vocabulary: 256 byte characters, the same 256 with `</w>`, the
merges in order, start, end."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType

import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from ldm_cli.data.tokenizer_config import MIN_VOCAB_SIZE, TokenizerConfig
from ldm_cli.data.tokenizer_files import CONTEXT_LENGTH, END, START, read_tokenizer_files
from ldm_cli.errors import CheckpointError, InputNotFoundError, LdmError, OutputError
from ldm_cli.storage import resolve_model_folder

_WORD_END = "</w>"
_PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_SPECIAL = re.compile(r"<\|(startoftext|endoftext)\|>", re.IGNORECASE)


# The characters that stand for bytes, in the vocabulary's order: those of printable bytes, which stand for themselves,
# come first.
_BYTES = tuple(sorted(pre_tokenizers.ByteLevel.alphabet()))
_ALPHABET = _BYTES + tuple(character + _WORD_END for character in _BYTES)


@dataclass(frozen=True)
class Tokens:
    """Token ids of a batch of texts.

    Attributes:
        input_ids: int64 [B, L]: start, text, end, then padding.
        num_tokens: for each text, tokens before the padding, start and end included; at most L.
        truncated: for each text that was too long, its index in the batch and the part that was cut off.
    """

    input_ids: Tensor
    num_tokens: tuple[int, ...]
    truncated: tuple[tuple[int, str], ...]

    @classmethod
    def framed(
        cls, encoder: tokenizers.Tokenizer, texts: list[str], length: int, start: tuple[int, ...], end: int, pad: int
    ) -> Tokens:
        """Those of texts, cut so that L are enough for `start`, text and `end`."""
        room = length - len(start) - 1
        input_ids = torch.full((len(texts), length), pad, dtype=torch.int64)
        num_tokens, truncated = [], []
        encodings = encoder.encode_batch(texts, add_special_tokens=False)
        for i, (text, encoding) in enumerate(zip(texts, encodings, strict=True)):
            ids = [*start, *encoding.ids[:room], end]
            input_ids[i, : len(ids)] = torch.tensor(ids)
            num_tokens.append(len(ids))
            if len(encoding.ids) > room:
                truncated.append((i, text[encoding.offsets[room][0] :]))
        return cls(input_ids, tuple(num_tokens), tuple(truncated))


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
            trained vocabulary without added tokens.
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
        added_tokens: Mapping[int, AddedToken] = MappingProxyType({}),
    ) -> None:
        """From a vocabulary and its merges.

        Args:
            vocab: token → id, with start and end.
            merges: pairs of tokens, the first merged first.
            pad_token: padding; where it is in no vocabulary, it gets the next id.
            model_max_length: the context length.
            added_tokens: tokens that are matched as a whole before a text is split, by id. The padding token is one, as
                in transformers: with Stable Diffusion 2, "!" in a prompt is id 0.

        Raises:
            ValueError: start or end is missing from `vocab`, or an added token cannot have its id.
        """
        missing = [token for token in (START, END) if token not in vocab]
        if missing:
            raise ValueError(f"Tokenizer: special tokens {missing} are not in the vocabulary of {len(vocab)}")
        self._vocab, self._merges, self._pad_token = dict(vocab), tuple(merges), pad_token
        self._encoder = _pipeline(self._vocab, self._merges)
        self._encoder.add_tokens([token for _, token in sorted(added_tokens.items())])
        for i, token in added_tokens.items():
            if self._encoder.token_to_id(token.content) != i:
                raise ValueError(f"added token {token.content!r} has id {i}, which the vocabulary does not leave free")
        names = dict.fromkeys((START, END, pad_token))
        known = {token.content for token in added_tokens.values()}
        self._encoder.add_special_tokens([_special(name) for name in names if name not in known])
        ids = self._encoder.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values()) + 1
        self.start_id, self.end_id, self.pad_id = ids[START], ids[END], ids[pad_token]
        self.model_max_length = model_max_length
        end, start = (END, self.end_id), (START, self.start_id)
        self._encoder.post_processor = processors.RobertaProcessing(end, start, False, False)
        self._encoder.decoder = decoders.ByteLevel()

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
        """Read the files of transformers 4 or 5, as `read_tokenizer_files`.

        Raises:
            InputNotFoundError: if neither `tokenizer.json` nor `vocab.json` and `merges.txt` are there.
            CheckpointError: if they are not a CLIP tokenizer, or ask for something that is not implemented.
        """
        folder = resolve_model_folder(Path(folder))
        try:
            files = read_tokenizer_files(folder)
            return cls(files.vocab, files.merges, files.pad_token, files.model_max_length, files.added_tokens)
        except InputNotFoundError as error:
            cause = f"{error.what}: {error.cause}" if error.cause else error.what
            raise InputNotFoundError(
                f"cannot load tokenizer '{folder}'", cause, "give a CLIP tokenizer's folder"
            ) from error
        except LdmError:
            raise
        except Exception as error:  # `tokenizers` reports every fault of its input as a plain Exception
            raise CheckpointError(f"'{folder}' is no CLIP tokenizer", f"{type(error).__name__}: {error}") from error

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides which ids a text gets."""
        parts = [sorted(self._vocab.items()), self._merges, self._pad_token, self._added_tokens()]
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
            "added_tokens_decoder": self._added_tokens(),
        }
        by_id = dict(sorted(self._vocab.items(), key=lambda item: item[1]))
        files = {
            "vocab.json": json.dumps(by_id, ensure_ascii=False, indent=0),
            "merges.txt": "\n".join(["#version: 0.2", *(f"{left} {right}" for left, right in self._merges)]),
            "tokenizer.json": self._encoder.to_str(pretty=True),
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
        return Tokens.framed(self._encoder, safe, length, (self.start_id,), self.end_id, self.pad_id)

    def pieces(self, text: str) -> list[tuple[int, int]]:
        """The tokens of a `defused` text: the id of each, and where it begins in the text."""
        encoding = self._encoder.encode(text, add_special_tokens=False)
        return [(token, start) for token, (start, _) in zip(encoding.ids, encoding.offsets, strict=True)]

    def add_words(self, words: Mapping[str, int]) -> dict[str, list[int]]:
        """Let words of any text stand for new tokens, whatever case they are written in; returns their ids.

        Args:
            words: how many tokens each stands for. One that begins or ends with a letter is no part of a longer word.
        """
        ids, replacements = {}, []
        for word, count in sorted(words.items(), key=lambda item: -len(item[0])):
            ids[word] = list(range(self.vocab_size, self.vocab_size + count))
            self.vocab_size += count
            before, after = (r"(?<!\w)" if word[0].isalnum() else ""), (r"(?!\w)" if word[-1].isalnum() else "")
            pattern = tokenizers.Regex(before + re.escape(word.lower()) + after)
            replacements.append(normalizers.Replace(pattern, "".join(map(_stand_in, ids[word]))))
        self._encoder.normalizer = normalizers.Sequence([self._encoder.normalizer, *replacements])
        self._encoder.add_tokens([AddedToken(_stand_in(i)) for own in ids.values() for i in own])
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, lower-case and with single blanks; special tokens are left out."""
        text: str = self._encoder.decode(list(ids), skip_special_tokens=True)
        return text.replace(_WORD_END, " ").strip()

    def _added_tokens(self) -> dict[str, dict[str, str | bool]]:
        """The added tokens, start, end and padding among them, as tokenizer_config.json has them."""
        flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
        added = sorted(self._encoder.get_added_tokens_decoder().items())
        return {str(i): {flag: getattr(token, flag) for flag in flags} for i, token in added}


def _stand_in(token_id: int) -> str:
    """A character for private use, which no text has, for a token of `add_words`."""
    return chr(0xF0000 + token_id)


def _special(token: str) -> AddedToken:
    return AddedToken(token, normalized=False, special=True)


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
