"""How often inpainting turns a circle into a star: python scripts/inpaint_accuracy.py runs/demo-unet

Scenes with one circle are drawn, the circle is masked with a margin, and the model is asked for a star of the same
colour there. The scene detector then reads the results.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch

from ldm_cli.data.scenes import Scene, scene
from ldm_cli.evaluation.scene_detector import read_scenes
from ldm_cli.families.open_family import open_family
from ldm_cli.pictures.images import from_pillow
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.edit_input import EditInput
from ldm_cli.sampling.pipeline import Pipeline
from ldm_cli.sampling.request import ImageRequest
from ldm_cli.sampling.sample_options import SampleOptions

MARGIN = 2
"""Pixels around the circle that are drawn anew, too."""


def circles(size: int) -> Iterator[Scene]:
    """Scenes of one circle, unseen in training."""
    return (s for i in count() if (s := scene(0, i, "val", size, 0.0)).truth["shape"] == "circle")


def mask_of(truth: dict[str, Any], size: int) -> torch.Tensor:
    """bool [H, W], true around the object."""
    left, top, right, bottom = (round(edge * size) for edge in truth["objects"][0]["box"])
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[max(0, top - MARGIN) : bottom + MARGIN, max(0, left - MARGIN) : right + MARGIN] = True
    return mask


def main() -> None:
    """Print the shares of right shapes, right colours, and both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--num-scenes", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    options = parser.parse_args()
    pipeline = Pipeline(open_family(options.model))
    config = SamplingConfig.from_mapping({"steps": options.steps, "guidance": options.guidance})
    size = pipeline.image_size(config)[0]
    shapes = colors = both = kept = 0
    for number, drawn in enumerate(islice(circles(size), options.num_scenes)):
        pixels, mask = from_pillow(drawn.image), mask_of(drawn.truth, size)
        wanted = SampleOptions(edit_input=EditInput(pixels, mask, (size, size), strength=1.0))
        prompt = f"a {drawn.truth['color']} star"
        (result,) = pipeline.generate([ImageRequest(prompt, number)], config, options=wanted)
        kept += torch.equal(result.pixels[:, ~mask], pixels[:, ~mask])
        seen = read_scenes(result.pixels[None])[0].objects
        is_star, is_color = bool(seen) and seen[0].shape == "star", bool(seen) and seen[0].color == drawn.truth["color"]
        shapes, colors, both = shapes + is_star, colors + is_color, both + (is_star and is_color)
    total = options.num_scenes
    print(f"star {shapes / total:.1%}, colour {colors / total:.1%}, both {both / total:.1%} of {total} circles")
    print(f"unchanged to the last bit outside of the mask: {kept} of {total}")


if __name__ == "__main__":
    main()
