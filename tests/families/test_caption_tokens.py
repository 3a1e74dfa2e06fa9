"""Captions become ids of one length; the first that is cut is told, once."""

from __future__ import annotations

from ldm_cli.data.tokenizer import Tokenizer
from ldm_cli.data.tokenizer_config import TokenizerConfig
from ldm_cli.families.caption_tokens import CaptionTokens


def test_a_caption_that_is_cut_is_told_once_and_short_ones_never() -> None:
    tokenizer = Tokenizer.train(["a red circle", "a blue square"] * 10, TokenizerConfig(vocab_size=600))
    warnings: list[str] = []
    tokens = CaptionTokens(tokenizer, 6, warnings.append)
    ids = tokens(["a red circle", ""])
    assert ids.shape == (2, 6)
    assert warnings == []
    cut = tokens(["a red circle a blue square"])
    assert cut[0, 0].item() == tokenizer.start_id
    assert cut[0, -1].item() == tokenizer.end_id
    tokens(["a red circle a blue square"])
    assert len(warnings) == 1
    assert "more than 4 tokens" in warnings[0]
    assert "'a red circle a blue square'" in warnings[0]
