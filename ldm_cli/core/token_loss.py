"""The loss of an autoregressive model of captions and pictures: the cross entropy of each token (Ramesh et al. 2021,
arXiv:2102.12092, section 2.2).

Letters: B batch, L tokens of a caption, P codes of a picture, S = L + P + 2 tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm_cli.core.models.llama_config import PictureTokens


@dataclass(frozen=True)
class TokenLosses:
    """Mean negative log-likelihood of each sample's tokens, in nats: float32 [B] each.

    Attributes:
        text: of the caption's tokens after the first, the end token included, padding left out.
        codes: of the picture's codes.
        end: of the token after them.
    """

    text: Tensor
    codes: Tensor
    end: Tensor


def sequences(captions: Tensor, codes: Tensor, tokens: PictureTokens) -> Tensor:
    """Captions int64 [B, L] and codes int64 [B, 1, h, w] → token ids int64 [B, S]."""
    begin, end = (torch.full_like(captions[:, :1], token) for token in (tokens.begin_id, tokens.end_id))
    return torch.cat([captions, begin, codes.flatten(1) + tokens.image_token_offset, end], dim=1)


def token_losses(logits: Tensor, ids: Tensor, tokens: PictureTokens, text_end: int) -> TokenLosses:
    """The losses of whole sequences.

    Args:
        logits: of the next token, [B, S − 1, V].
        ids: int64 [B, S].
        tokens: where caption and codes are.
        text_end: token at the end of a caption; equal ones after it are padding.
    """
    losses = F.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")
    text, rest = losses[:, : tokens.text_length - 1], losses[:, tokens.text_length - 1 :]
    is_end = ids[:, 1 : tokens.text_length] == text_end
    counts = (is_end.cumsum(1) - is_end.long() == 0).float()
    return TokenLosses((text * counts).sum(1) / counts.sum(1), rest[:, 1:-1].mean(1), rest[:, -1])
