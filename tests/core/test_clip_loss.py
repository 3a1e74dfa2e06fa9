"""The contrastive loss against its closed forms and transformers' definition."""

from __future__ import annotations

import math

import pytest
import torch

from ldm_cli.core.clip_loss import contrastive_loss


def test_unrelated_features_cost_the_logarithm_of_the_batch() -> None:
    same = torch.ones(8, 4)
    loss, figures = contrastive_loss(same, same, torch.tensor(10.0))
    assert loss.item() == pytest.approx(math.log(8), rel=1e-6)
    assert figures["accuracy"].item() == pytest.approx(1 / 8)


def test_orthogonal_pairs_have_the_closed_form() -> None:
    features = torch.eye(5) * 3.0
    loss, figures = contrastive_loss(features, features, torch.tensor(2.0))
    assert loss.item() == pytest.approx(math.log(math.exp(2) + 4) - 2, rel=1e-5)
    assert figures["accuracy"].item() == 1.0


def test_it_is_symmetric_and_blind_to_length() -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(6, 4, generator=generator) for _ in range(2))
    loss, _ = contrastive_loss(image, text, torch.tensor(5.0))
    swapped, _ = contrastive_loss(text * 7, image * 0.1, torch.tensor(5.0))
    assert loss.item() == pytest.approx(swapped.item(), rel=1e-5)


def test_different_shapes_are_misuse() -> None:
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(3, 4\)"):
        contrastive_loss(torch.zeros(2, 4), torch.zeros(3, 4), torch.tensor(1.0))
