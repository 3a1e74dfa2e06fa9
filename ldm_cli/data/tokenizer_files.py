"""The files of a CLIP tokenizer, in the layouts of transformers 4 and 5, read as transformers 5 reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from ldm_cli.manifest import expect_listed, read_listed

START, END = "<|startoftext|>", "<|endoftext|>"
CONTEXT_LENGTH = 77
MOST_TOKENIZER_BYTES = 2**26
"""Largest file of a tokenizer that is read: twice the largest known."""

_FILES = ("vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")
_WORD_END = "</w>"
# Of these settings one value is implemented.
_ONLY: dict[str, Any] = {
    "bos_token": START,
    "eos_token": END,
    "unk_token": END,
    "padding_side": "right",
    "truncation_side": "right",
    "split_special_tokens": False,
}
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


@dataclass(frozen=True)
class TokenizerFiles:
    """What the files say.

    Attributes:
        vocab: token → id.
        merges: pairs of tokens, in order.
        added_tokens: tokens that are matched as a whole, by id.
        model_max_length: the context length.
    """

    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    added_tokens: dict[int, AddedToken]
    pad_token: str
    model_max_length: int


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Read `tokenizer.json`, or else `vocab.json` and `merges.txt`; and the optional files beside them.

    Added tokens are those of `added_tokens_decoder` in tokenizer_config.json. Without it, they are those of
    special_tokens_map.json, added_tokens.json and tokenizer.json together.

    Raises:
        InputNotFoundError, StorageError: a file cannot be read, or neither pair is there.
        CheckpointError: a file is not the one that the manifest of its folder names.
        ValueError, KeyError, TypeError: the files are no CLIP tokenizer, or have a setting that is not implemented.
    """
    for file in (folder / name for name in _FILES):
        if file.exists():  # those that are not needed here are read by others
            expect_listed(file)
    whole = _read_object(folder / "tokenizer.json", optional=True)
    settings = _read_object(folder / "tokenizer_config.json", optional=True)
    vocab, merges = _vocabulary(folder, whole)
    if "added_tokens_decoder" in settings:
        by_id = {int(i): _added_token(entry) for i, entry in settings["added_tokens_decoder"].items()}
    else:
        extra = settings.get("additional_special_tokens")
        settings |= _read_object(folder / "special_tokens_map.json", optional=True)
        # Additional tokens of special_tokens_map.json alone do not count as special here.
        named = _special_tokens(settings | {"additional_special_tokens": extra})
        special = {_content(token) for token in named}
        by_id = {
            i: AddedToken(token, normalized=token not in special, special=token in special)
            for token, i in _read_object(folder / "added_tokens.json", optional=True).items()
        }
        by_id |= {entry["id"]: _added_token(entry) for entry in whole.get("added_tokens") or ()}
    for name, side in (("padding", "padding_side"), ("truncation", "truncation_side")):
        settings = {side: (whole.get(name) or {}).get("direction", "right").lower()} | settings
    for name, expected in _ONLY.items():
        found = settings.get(name)
        if found is not None and _content(found) != expected:
            raise ValueError(f"{name}={_content(found)!r} is not supported, only {expected!r}")
    added_tokens = _with_special_tokens(vocab, by_id, settings)
    _expect_whole(vocab, merges, added_tokens)
    length = settings.get("model_max_length", settings.get("max_len"))
    return TokenizerFiles(
        vocab,
        merges,
        added_tokens,
        _content(settings.get("pad_token") or END),
        # transformers writes 1e30 where nothing limits the length.
        int(length) if isinstance(length, int | float) and 2 < length <= 2**20 else CONTEXT_LENGTH,
    )


def _with_special_tokens(
    vocab: Mapping[str, int], by_id: Mapping[int, AddedToken], settings: Mapping[str, Any]
) -> dict[int, AddedToken]:
    """`by_id`, and the special tokens that it lacks: with the id that the vocabulary has, or the next one."""
    added, known = dict(by_id), {token.content for token in by_id.values()}
    for token in _special_tokens(settings):
        if (content := _content(token)) not in known:
            known.add(content)
            next_id = max(*vocab.values(), *added) + 1
            added[vocab.get(content, next_id)] = _added_token(token, special=True)
    return added


def _expect_whole(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], added_tokens: Mapping[int, AddedToken]
) -> None:
    """Refuse ids with gaps, and a vocabulary with tokens that no merge makes: a part of the files is lost.

    Raises:
        ValueError: naming one of them.
    """
    ids = {*vocab.values(), *added_tokens}
    if missing := set(range(max(ids) + 1)) - ids:
        raise ValueError(f"it has no token {min(missing)}, though its last one is {max(ids)}")
    known = {START, END, *(left + right for left, right in merges), *(t.content for t in added_tokens.values())}
    lost = [token for token in vocab if len(token.removesuffix(_WORD_END)) > 1 and token not in known]
    if lost:
        raise ValueError(f"no merge makes {len(lost)} of its tokens, such as {lost[0]!r}: its merges are cut")


def _special_tokens(settings: Mapping[str, Any]) -> list[Any]:
    """The special tokens of the settings, each a string or an object, in the order in which transformers adds them."""
    named = [settings[name] for name in _NAMED_TOKENS if settings.get(name)]
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        return [*named, *extra.values()]
    own = [v for name, v in settings.items() if name.endswith("_token") and name not in _NAMED_TOKENS]
    return [*named, *(token for token in own if isinstance(token, str)), *extra]


def _content(token: Any) -> Any:
    return token["content"] if isinstance(token, dict) else token


def _added_token(entry: Any, special: bool | None = None) -> AddedToken:
    """A token as the files have it: its text, or an object with its flags."""
    if isinstance(entry, str):
        return AddedToken(entry, normalized=False, special=True)
    flags = {name: entry[name] for name in _FLAGS if name in entry}
    return AddedToken(entry["content"], **(flags if special is None else flags | {"special": special}))


def _read_object(path: Path, optional: bool = False) -> dict[str, Any]:
    if optional and not path.exists():
        return {}
    content = json.loads(read_listed(path, MOST_TOKENIZER_BYTES))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds a {type(content).__name__}, not an object")
    return content


def _vocabulary(folder: Path, whole: Mapping[str, Any]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokens with their ids, and the merges in order; `whole` is the content of tokenizer.json, or empty."""
    if whole:
        vocab: dict[str, int] = whole["model"]["vocab"]
        pairs = [pair.split() if isinstance(pair, str) else pair for pair in whole["model"]["merges"]]
    else:
        vocab = _read_object(folder / "vocab.json")
        lines = read_listed(folder / "merges.txt", MOST_TOKENIZER_BYTES).decode().split("\n")
        pairs = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError("one of its merges is not two tokens")
    if not all(type(i) is int for i in vocab.values()) or len(set(vocab.values())) != len(vocab):
        raise ValueError("its ids are not whole numbers, each used once")
    return vocab, [(left, right) for left, right in pairs]
