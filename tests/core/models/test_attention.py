"""Attention against its formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ldm_cli.core.models.attention import attend


@pytest.mark.parametrize("num_keys", [1, 5, 16, 77])
@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_is_its_formula_in_every_head(num_keys: int, is_causal: bool) -> None:
    queries = num_keys if is_causal else 9
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 12, generator=random) for n in (queries, num_keys, num_keys))

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(Q Kᵀ / √d) V of one head, [B, L, d]."""
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if is_causal:
            scores = scores.masked_fill(torch.ones(queries, queries).triu(1).bool(), -torch.inf)
        return scores.softmax(dim=-1) @ v

    expected = torch.cat([formula(*(x[..., head : head + 4] for x in (q, k, v))) for head in (0, 4, 8)], dim=-1)
    torch.testing.assert_close(attend(q, k, v, 3, is_causal=is_causal), expected, atol=1e-6, rtol=1e-5)
