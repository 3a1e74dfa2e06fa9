"""How many questions about drawn scenes a CLIP answers: colour, shape, size, place and number, each against chance.

python benchmarks/questions.py MODEL [SCENES]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ldm_cli.data import scene_vocabulary as words
from ldm_cli.data.decode import from_pillow
from ldm_cli.data.scenes import Truth, scene
from ldm_cli.evaluation.clip_features import CLIPFeatures
from ldm_cli.evaluation.questions import statement
from ldm_cli.families.open_family import resolve_model

NUMBERS = ("one", "two")


def questions(truth: Truth) -> Iterator[tuple[str, str, tuple[str, ...], str]]:
    """Kind, question, offered answers and right answer; of scenes with two objects the number alone."""
    yield "number", "How many objects are there?", NUMBERS, NUMBERS[truth["num_objects"] - 1]
    if truth["num_objects"] == 1:
        color, shape = truth["color"], truth["shape"]
        yield "colour", f"What colour is the {shape}?", words.COLOR_NAMES, color
        yield "shape", f"What shape is the {color} object?", words.SHAPE_NAMES, shape
        yield "size", f"What size is the {color} {shape}?", words.SIZE_NAMES, truth["size"]
        yield "place", f"Where is the {color} {shape}?", words.PLACE_NAMES, truth["place"]


def accuracy(clip: CLIPFeatures, num_scenes: int, side: int = 32, two_object_fraction: float = 0.5) -> dict[str, Any]:
    """By kind: the share of right answers, that of guessing, and the number of questions, on scenes of `val`."""
    right: dict[str, list[bool]] = {}
    chance: dict[str, float] = {}
    known: dict[str, torch.Tensor] = {}
    for number in range(num_scenes):
        drawn = scene(1, number, "val", side, two_object_fraction)
        image = clip.pictures([from_pillow(drawn.image)[0]])[0]
        for kind, question, answers, wanted in questions(drawn.truth):
            statements = [statement(question, answer) for answer in answers]
            if new := [text for text in statements if text not in known]:
                known |= dict(zip(new, F.normalize(clip.texts(new), dim=1), strict=True))
            cosines = torch.stack([known[text] for text in statements]) @ image
            right.setdefault(kind, []).append(answers[int(cosines.argmax())] == wanted)
            chance[kind] = 1 / len(answers)
    return {
        kind: {"accuracy": sum(hits) / len(hits), "chance": chance[kind], "num_questions": len(hits)}
        for kind, hits in right.items()
    }


if __name__ == "__main__":
    model = CLIPFeatures.load(resolve_model(Path(sys.argv[1])), torch.device("cpu"))
    print(json.dumps(accuracy(model, int(sys.argv[2]) if len(sys.argv) > 2 else 400), indent=2))
