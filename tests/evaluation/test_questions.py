"""Questions and answers become the statements that captions make."""

from __future__ import annotations

import pytest

from ldm_cli.data.scenes import scene
from ldm_cli.evaluation.questions import statement

CASES = [
    ("What colour is the circle?", "red", "a red circle"),
    ("what color is the circle on the left", "orange", "an orange circle on the left"),
    ("What is the colour of the sky?", "blue", "a blue sky"),
    ("What colour is it?", "red", "a red object"),
    ("What colour is the object on the left?", "red", "a red object on the left"),
    ("What shape is the red object?", "circle", "a red circle"),
    ("Which shape is the object on the left?", "star", "a star on the left"),
    ("What shape is the sign?", "round", "a round sign"),
    ("What shape is it?", "ring", "a ring"),
    ("What size is the circle?", "small", "a small circle"),
    ("How many circles are there?", "two", "two circles"),
    ("How many circles are there in the picture?", "one", "one circle"),
    ("How many people are there in the street?", "1", "1 person in the street"),
    ("How many boxes?", "one", "one box"),
    ("How many berries can you see?", "one", "one berry"),
    ("Where is the red circle?", "top left", "a red circle at the top left"),
    ("Where is the red circle?", "left", "a red circle on the left"),
    ("Where is the circle?", "center", "a circle in the center"),
    ("Where is the cat?", "kitchen", "a cat in the kitchen"),
    ("Where is the cat?", "on the sofa", "a cat on the sofa"),
    ("Is there a cat?", "yes", "a cat"),
    ("Are there any dogs in the picture?", "Yes", "dogs"),
    ("Is there a cat?", "no", "no cat"),
    ("Is the circle red?", "yes", "the circle is red"),
    ("Is the circle red?", "no", "the circle is not red"),
    ("Is it a dog?", "yes", "a dog"),
    ("Is this a dog?", "no", "not a dog"),
    ("What is this?", "airplane", "an airplane"),
    ("What is in the picture?", "the sea", "the sea"),
    ("What do you see?", "two cats", "two cats"),
    ("Which animal is in this photo?", "owl", "an owl"),
    ("What kind of animal is this?", "dog", "a dog"),
    ("Which car is red?", "left", "the left car is red"),
    ("What is the man doing?", "running", "the man is running"),
    ("What is the man holding?", "a cup", "the man is holding a cup"),
    ("What is the largest object?", "a box", "the largest object is a box"),
]


@pytest.mark.parametrize(("question", "answer", "expected"), CASES)
def test_a_question_and_its_answer_become_a_statement(question: str, answer: str, expected: str) -> None:
    assert statement(question, answer) == expected


@pytest.mark.parametrize(("question", "answer"), [("Who painted  it?", "Vermeer"), ("Is there a cat or a dog?", "cat")])
def test_other_questions_stand_before_their_answer(question: str, answer: str) -> None:
    assert statement(question, answer) == f"{' '.join(question.split())} {answer}"


def test_statements_about_drawn_scenes_are_their_captions() -> None:
    drawn = [scene(0, number, "train", 32, 0.0) for number in range(400)]
    plain = [
        one for one in drawn if one.truth["stated"] == ["shape", "color"] and one.caption.startswith(("a ", "an "))
    ]
    plain = [one for one in plain if " of " not in one.caption]
    assert len(plain) > 50
    for one in plain:
        color, shape = one.truth["color"], one.truth["shape"]
        assert statement(f"What colour is the {shape}?", color) == one.caption
        assert statement(f"What shape is the {color} object?", shape) == one.caption
