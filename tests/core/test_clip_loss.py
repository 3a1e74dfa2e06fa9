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


def test_equal_captions_share_the_target_and_groups_of_one_change_nothing() -> None:
    generator = torch.Generator().manual_seed(3)
    image, text = (torch.randn(4, 8, generator=generator) for _ in range(2))
    plain, _ = contrastive_loss(image, text, torch.tensor(4.0))
    alone, _ = contrastive_loss(image, text, torch.tensor(4.0), groups=torch.tensor([7, -2, 5, 0]))
    torch.testing.assert_close(alone, plain)

    same_text = text[[0, 0, 2, 3]]
    groups = torch.tensor([9, 9, 1, 2])
    shared, _ = contrastive_loss(image, same_text, torch.tensor(4.0), groups=groups)
    logits = 4.0 * torch.nn.functional.normalize(image, dim=1) @ torch.nn.functional.normalize(same_text, dim=1).T
    by_hand = torch.stack([-logits.log_softmax(dim)[i, j] for dim in (0, 1) for i, j in ((2, 2), (3, 3))]).sum()
    halves = [-logits.log_softmax(dim)[i, j] / 2 for dim in (0, 1) for i in (0, 1) for j in (0, 1)]
    torch.testing.assert_close(shared, (by_hand + torch.stack(halves).sum()) / 8)


def test_grouping_equal_captions_changes_accuracy_and_neither_loss_nor_gradients() -> None:
    generator = torch.Generator().manual_seed(5)
    captions = torch.tensor([0, 1, 0, 2, 1, 0, 3, 0])
    text = torch.randn(4, 8, generator=generator).requires_grad_()
    image = (text.detach()[captions] + 0.1 * torch.randn(8, 8, generator=generator)).requires_grad_()
    alone, grouped = (
        (loss, *torch.autograd.grad(loss, [image, text]), figures["accuracy"])
        for loss, figures in (
            contrastive_loss(image, text[captions], torch.tensor(6.0), groups=groups) for groups in (None, captions)
        )
    )
    for ours, pairs in zip(grouped[:3], alone[:3], strict=True):
        torch.testing.assert_close(ours, pairs)
    assert (alone[3], grouped[3]) == (0.5, 1.0)  # alone, only the first of each caption counts


def test_rows_of_the_loss_with_groups_average_to_the_whole() -> None:
    generator = torch.Generator().manual_seed(4)
    image, text = (torch.randn(6, 8, generator=generator) for _ in range(2))
    groups = torch.tensor([1, 2, 1, 3, 3, 1])
    whole, figures = contrastive_loss(image, text, torch.tensor(3.0), groups=groups)
    parts = [contrastive_loss(image, text, torch.tensor(3.0), slice(i, i + 3), groups) for i in (0, 3)]
    torch.testing.assert_close((parts[0][0] + parts[1][0]) / 2, whole)
    torch.testing.assert_close((parts[0][1]["accuracy"] + parts[1][1]["accuracy"]) / 2, figures["accuracy"])
