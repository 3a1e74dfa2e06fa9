"""Captions as token ids, for the tasks that train on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm_cli.data.tokenizer import Tokenizer
from ldm_cli.families.prompt_chunks import PromptReading, TokenRow


class CaptionTokens:
    """Encodes captions to a fixed length, and tells once that some are longer.

    Args:
        length: L, tokens of a chunk.
        warn: called once.
        num_chunks: n, chunks of each caption.
    """

    def __init__(self, tokenizer: Tokenizer, length: int, warn: Callable[[str], None], num_chunks: int = 1) -> None:
        self._tokenizer, self._length, self._warn, self._num_chunks = tokenizer, length, warn, num_chunks
        self._has_warned = False

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Token ids int64 [B, n·L] of B captions."""
        if self._num_chunks == 1:
            tokens = self._tokenizer.encode(captions, self._length)
            ids, cut = tokens.input_ids, dict(tokens.truncated)
        else:
            of, reading = TokenRow.of, PromptReading(long=True)
            rows = [of(text, self._tokenizer, self._length, reading, self._num_chunks) for text in captions]
            ids, cut = torch.tensor([row.ids for row in rows]), {i: row.cut for i, row in enumerate(rows) if row.cut}
        if cut and not self._has_warned:
            index, rest = next(iter(cut.items()))
            places = f"{self._num_chunks} × {self._length - 2}" if self._num_chunks > 1 else str(self._length - 2)
            self._warn(
                f"captions of more than {places} tokens are cut, such as {captions[index][:60]!r} "
                f"before {rest[:40]!r}; raise max_position_embeddings, or train-unet's caption_chunks, to keep them"
            )
            self._has_warned = True
        return ids
