"""unCLIP's prior against diffusers, on random configurations and weights."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from ldm_cli.core.condition import Condition
from ldm_cli.core.models.prior_transformer import PriorTransformer
from ldm_cli.core.models.prior_transformer_config import PriorTransformerConfig

from .test_models import assert_close, assert_same_weights

diffusers = pytest.importorskip("diffusers")


def random_prior(seed: int) -> tuple[PriorTransformer, Any]:
    choose = random.Random(seed)
    fields = {
        "num_attention_heads": choose.choice([1, 2, 4]),
        "attention_head_dim": choose.choice([4, 8]),
        "num_layers": choose.choice([1, 3]),
        "embedding_dim": choose.choice([6, 16]),
        "num_embeddings": choose.choice([5, 11]),
    }
    torch.manual_seed(seed)
    theirs = diffusers.PriorTransformer(**fields)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = PriorTransformer(PriorTransformerConfig.from_hugging_face(dict(theirs.config)))
    ours.load_state_dict(theirs.state_dict())
    return ours.eval(), theirs.eval()


def random_condition(model: PriorTransformer, batch: int) -> Condition:
    size, length = model.config.embedding_dim, model.config.num_embeddings
    ends = torch.randint(1, length + 1, (batch,))
    mask = (torch.arange(length) < ends[:, None]).float()
    return Condition(tokens=torch.randn(batch, length, size), pooled=torch.randn(batch, size), mask=mask)


@pytest.mark.parametrize("seed", range(8))
def test_the_prior_computes_what_theirs_does(seed: int) -> None:
    ours, theirs = random_prior(seed)
    assert_same_weights(ours, theirs)
    condition = random_condition(ours, 3)
    x, t = torch.randn(3, ours.config.embedding_dim), torch.tensor([0, 500, 999])
    with torch.no_grad():
        found = ours(x, t.float(), condition)
        expected = theirs(
            x, t, proj_embedding=condition.pooled, encoder_hidden_states=condition.tokens, attention_mask=condition.mask
        ).predicted_image_embedding
    assert_close(found, expected)


def test_the_padding_of_a_caption_changes_nothing() -> None:
    ours, _ = random_prior(0)
    condition = random_condition(ours, 1)
    assert condition.tokens is not None
    assert condition.mask is not None
    condition.mask[0, 3:] = 0.0
    x, t = torch.randn(1, ours.config.embedding_dim), torch.tensor([10.0])
    with torch.no_grad():
        expected = ours(x, t, condition)
        condition.tokens[0, 3:] = 100.0
        assert torch.equal(ours(x, t, condition), expected)
        condition.tokens[0, 2] = 100.0
        assert not torch.equal(ours(x, t, condition), expected)


def test_the_config_goes_both_ways() -> None:
    ours, theirs = random_prior(1)
    written = ours.config.to_hugging_face()
    assert PriorTransformerConfig.from_hugging_face(written) == ours.config
    assert {n: v for n, v in dict(theirs.config).items() if n[0] != "_"} == {
        n: v for n, v in written.items() if n[0] != "_"
    }


def test_a_prior_without_a_mask_is_refused() -> None:
    ours, _ = random_prior(2)
    condition = Condition(tokens=torch.randn(1, 5, 6), pooled=torch.randn(1, 6))
    with pytest.raises(ValueError, match="the prior needs tokens, pooled and mask"):
        ours(torch.randn(1, 6), torch.zeros(1), condition)
