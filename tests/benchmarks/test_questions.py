"""The study of questions: what it asks about scenes, and what it counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.questions import accuracy, questions
from ldm_cli.data.scenes import scene


class Knowing:
    """Knows the scene, and says "yes" to statements with all of its words."""

    def pictures(self, pictures: Sequence[Tensor]) -> Tensor:
        return torch.ones(len(pictures), 1)

    def texts(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([[1.0 if "red" in text.split() else 0.5] for text in texts])


def test_each_kind_is_asked_with_the_right_answer_among_those_offered() -> None:
    asked: set[str] = set()
    for number in range(40):
        truth = scene(1, number, "val", 32, 0.5).truth
        for kind, _, answers, wanted in questions(truth):
            assert wanted in answers
            asked.add(kind)
            assert kind == "number" or truth["num_objects"] == 1
    assert asked == {"number", "colour", "shape", "size", "place"}


def test_a_constant_answer_is_right_as_often_as_the_scenes_have_it() -> None:
    clip: Any = Knowing()
    found = accuracy(clip, 60)
    drawn = [scene(1, number, "val", 32, 0.5).truth for number in range(60)]
    single = [truth for truth in drawn if truth["num_objects"] == 1]
    first = sum(truth["color"] == "red" for truth in single) / len(single)
    assert found["colour"] == {"accuracy": pytest.approx(first), "chance": 1 / 8, "num_questions": len(single)}
    assert found["number"]["num_questions"] == 60
