"""Attention against that of torch on the same keys, whatever is added to fill vectors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ldm_cli.core.models.attention import Attention, FixedContext, attend, in_lanes


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("num_keys", [1, 5, 16, 17, 29, 77])
@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_is_that_of_torch_for_every_number_of_keys(num_keys: int, is_causal: bool) -> None:
    queries = num_keys if is_causal else 9
    q, k, v = random(2, queries, 12, seed=0), random(2, num_keys, 12, seed=1), random(2, num_keys, 12, seed=2)
    weight = random(2, queries, 12, seed=3).detach()
    split = [x.view(2, -1, 3, 4).transpose(1, 2) for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*split, is_causal=is_causal).transpose(1, 2).flatten(2)
    actual = attend(q, k, v, 3, is_causal=is_causal)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)
    gradients = [torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (actual, expected)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("num_keys", "padded"), [(77, 80), (13, 16), (64, 64), (65, 65), (72, 72)])
def test_keys_are_added_where_few_fill_the_vectors(num_keys: int, padded: int) -> None:
    keys = torch.ones(1, num_keys, 4)
    key, value, mask = in_lanes(keys, 2 * keys)
    assert key.shape == value.shape == (1, padded, 4)
    assert (mask is None) == (padded == num_keys)
    if mask is not None:
        assert mask.flatten().tolist() == [0.0] * num_keys + [-torch.inf] * (padded - num_keys)


@pytest.mark.parametrize("fixed", [False, True])
def test_each_query_meets_several_contexts(fixed: bool) -> None:
    torch.manual_seed(0)
    layer, x, contexts = Attention(12, 8, 3, bias=False), torch.randn(2, 5, 12), torch.randn(6, 13, 8)
    with torch.no_grad():
        actual = layer(x, FixedContext(contexts) if fixed else contexts)
        expected = torch.cat([layer(x, part) for part in contexts.split(2)])
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)
