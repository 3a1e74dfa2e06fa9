"""The table of image prompts: what it counts, and how it is written."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from benchmarks import image_prompts
from ldm_cli.data import scene_vocabulary as words
from ldm_cli.data.scene_drawing import paint
from ldm_cli.pictures.images import read_image


def test_colours_and_shapes_are_counted(tmp_path: Path) -> None:
    pictures = [read_image(image_prompts.image_prompt(tmp_path / "circle.png"))]
    for color in ("red", "blue"):
        picture = Image.new("RGB", (32, 32), words.BACKGROUNDS["white"])
        paint(picture, "square", words.COLORS[color], (0.5, 0.5), 0.3)
        picture.save(tmp_path / f"{color}.png")
        pictures.append(read_image(tmp_path / f"{color}.png"))
    pictures.append(torch.full((3, 32, 32), 255, dtype=torch.uint8))
    found = image_prompts.shares(torch.stack(pictures))
    assert found == (0.5, 0.25, 0.5, 0.25)
    assert image_prompts.table({0.25: found}).splitlines()[2] == "| 0.25 | 50% | 25% | 50% | 25% |"
