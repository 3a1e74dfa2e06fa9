from __future__ import annotations

import pytest
import torch

from ldm_cli.core.condition import Condition


def test_map_applies_to_every_field_that_is_there() -> None:
    condition = Condition(tokens=torch.ones(2, 3, 4), pooled=torch.ones(2, 5)).map(lambda t: t * 2)
    assert torch.equal(condition.tokens, torch.full((2, 3, 4), 2.0))  # type: ignore[arg-type]
    assert torch.equal(condition.pooled, torch.full((2, 5), 2.0))  # type: ignore[arg-type]
    assert condition.image_tokens is None
    assert condition.concat is None


def test_cat_puts_rows_after_one_another() -> None:
    first, second = (Condition(tokens=torch.full((n, 1, 2), float(n)), concat=torch.zeros(n, 1, 4, 4)) for n in (1, 2))
    both = Condition.cat([first, second])
    assert both.tokens is not None
    assert both.tokens[:, 0, 0].tolist() == [1.0, 2.0, 2.0]
    assert both.concat is not None
    assert both.concat.shape == (3, 1, 4, 4)


def test_conditions_with_different_fields_cannot_be_combined() -> None:
    with pytest.raises(ValueError, match="1 of 2 have 'pooled'"):
        Condition.cat([Condition(pooled=torch.ones(1, 2)), Condition()])


def test_a_condition_is_made_of_its_tensors_again() -> None:
    condition = Condition(tokens=torch.ones(2, 3, 4), pooled=torch.tensor([3, 5]))
    assert list(condition.tensors) == ["tokens", "pooled"]
    assert Condition(**condition.tensors) == condition


def test_dropped_rows_are_those_of_the_empty_condition() -> None:
    condition = Condition(tokens=torch.arange(6.0).view(3, 1, 2), pooled=torch.tensor([1, 2, 3]))
    empty = Condition(tokens=torch.full((1, 1, 2), -1.0), pooled=torch.tensor([0]))
    dropped = condition.replaced(torch.tensor([False, True, False]), empty)
    assert dropped.tokens is not None
    assert dropped.tokens[:, 0].tolist() == [[0.0, 1.0], [-1.0, -1.0], [4.0, 5.0]]
    assert dropped.pooled is not None
    assert dropped.pooled.tolist() == [1, 0, 3]


def test_sizes_follow_the_pooled_text_as_float32() -> None:
    pooled = torch.tensor([[0.5], [1.5]], dtype=torch.bfloat16)
    condition = Condition(pooled=pooled).with_sizes(torch.tensor([[1023, 998, 3, 5, 1024, 1000]]))
    assert condition.pooled is not None
    assert condition.pooled.tolist() == [[0.5, 1023, 998, 3, 5, 1024, 1000], [1.5, 1023, 998, 3, 5, 1024, 1000]]
    with pytest.raises(ValueError, match="pooled is None"):
        Condition().with_sizes(torch.zeros(1, 6))
