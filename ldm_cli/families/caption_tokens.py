"""Captions as token ids, for the tasks that train on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ldm_cli.data.tokenizer import Tokenizer


class CaptionTokens:
    """Encodes captions to a fixed length, and tells once that some are longer."""

    def __init__(self, tokenizer: Tokenizer, length: int, warn: Callable[[str], None]) -> None:
        self._tokenizer, self._length, self._warn = tokenizer, length, warn
        self._has_warned = False

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Token ids int64 [B, L] of B captions."""
        tokens = self._tokenizer.encode(captions, self._length)
        if tokens.truncated and not self._has_warned:
            index, rest = tokens.truncated[0]
            self._warn(
                f"captions of more than {self._length - 2} tokens are cut, such as {captions[index][:60]!r} "
                f"before {rest[:40]!r}; raise max_position_embeddings to keep them whole"
            )
            self._has_warned = True
        return tokens.input_ids
