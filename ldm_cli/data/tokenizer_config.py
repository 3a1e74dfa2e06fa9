"""Where a recipe's vocabulary comes from, without the library that trains it: recipes are checked by this."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ldm_cli.config import Config

MIN_VOCAB_SIZE = 256 + 256 + 2
"""Every byte, every word-final byte, start and end: 514."""


class TokenizerConfig(Config):
    """Where the vocabulary comes from."""

    path: str | None = None
    """Folder with `vocab.json` and `merges.txt` (or `tokenizer.json`) to load; null: train from the
    captions."""
    vocab_size: Annotated[int, Field(ge=MIN_VOCAB_SIZE)] = 1000
    """Most tokens to train: 514 for bytes, start and end, the rest merges. Few captions may give fewer."""
    max_captions: Annotated[int, Field(ge=1)] = 1_000_000
    """Train on the first so many captions."""
