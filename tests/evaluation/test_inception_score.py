"""The Inception score in cases that are known, and a number of torch-fidelity."""

from __future__ import annotations

import pytest
import torch

from ldm_cli.evaluation.inception_score import inception_score


def test_pictures_of_one_class_or_of_no_class_score_one() -> None:
    for logits in (torch.zeros(30, 5), 1000 * torch.eye(5)[[2] * 30]):
        assert inception_score(logits) == pytest.approx({"inception_score": 1, "inception_score_std": 0}, abs=1e-12)


def test_sure_pictures_of_different_classes_score_the_number_of_classes() -> None:
    # Ten parts of six pictures each, in which no class occurs twice.
    found = inception_score(1000 * torch.eye(60))
    assert found["inception_score"] == pytest.approx(6)


def test_the_score_is_that_of_torch_fidelity() -> None:
    logits = 4 * torch.sin(torch.arange(33 * 7.0)).view(33, 7)
    theirs = {"inception_score": 1.8474864641646398, "inception_score_std": 0.5200632600962315}  # version 0.4.0
    assert inception_score(logits) == pytest.approx(theirs, rel=1e-6)


def test_too_few_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="9 pictures, but at least 10"):
        inception_score(torch.zeros(9, 5))
