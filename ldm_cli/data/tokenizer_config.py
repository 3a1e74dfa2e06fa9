"""The `tokenizer` section of a recipe, without the tokenizer's library: recipes are checked with this alone."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ldm_cli.config import Config, NamesModel

MIN_VOCAB_SIZE = 256 + 256 + 2
"""Every byte, every word-final byte, start and end: 514."""


class TokenizerConfig(Config):
    """Source of the vocabulary."""

    path: Annotated[str | None, NamesModel(("tokenizer",))] = None
    """Folder with `vocab.json` and `merges.txt` (or `tokenizer.json`); null: train on the captions."""
    vocab_size: Annotated[int, Field(ge=MIN_VOCAB_SIZE)] = 1000
    """Largest number of tokens to train: 514 for bytes, start and end, the rest merges. Few captions may give fewer."""
    max_captions: Annotated[int, Field(ge=1)] = 1_000_000
    """Number of captions to train on, the first ones."""
