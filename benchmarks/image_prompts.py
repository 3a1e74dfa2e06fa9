"""Whether pictures follow an image prompt or their text, at each scale of the image prompt.

`python benchmarks/image_prompts.py` after the training of `make demo-image-prompt`: a red circle as image prompt, "a
square" as text. It prints the table of docs/image-prompts.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ldm_cli.data import scene_vocabulary as words
from ldm_cli.data.scene_drawing import paint
from ldm_cli.evaluation.scene_detector import read_scenes
from ldm_cli.pictures.images import read_image
from ldm_cli.recipe.sample_recipe import SampleRecipe
from ldm_cli.reporting import SilentReporter
from ldm_cli.stages import sample
from ldm_cli.stages.support.options import RunOptions

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
TEXT = "a square"
COLUMNS = ("red, as the picture", "a circle, as the picture", "a square, as the text", "a red square")


def image_prompt(path: Path) -> Path:
    """Draw a large red circle in the middle of a white picture; returns the path."""
    picture = Image.new("RGB", (32, 32), words.BACKGROUNDS["white"])
    paint(picture, "circle", words.COLORS["red"], (0.5, 0.5), sum(words.SIZES["large"]) / 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return path


def shares(pictures: Tensor) -> tuple[float, ...]:
    """The share of pictures, uint8 [N, 3, S, S], that shows each of `COLUMNS` in its largest object."""
    seen = [scene.objects[0] if scene.objects else None for scene in read_scenes(pictures)]
    found = [(one.color, one.shape) if one is not None else ("", "") for one in seen]
    hits = [
        (color == "red", shape == "circle", shape == "square", (color, shape) == ("red", "square"))
        for color, shape in found
    ]
    return tuple(sum(column) / len(hits) for column in zip(*hits, strict=True))


def table(rows: dict[float, Sequence[float]]) -> str:
    """A table in Markdown, with a row for each scale."""
    lines = ["| scale | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| {scale:g} | " + " | ".join(f"{share:.0%}" for share in row) + " |" for scale, row in rows.items()]
    return "\n".join(lines)


def generated(scale: float, number: int, root: Path, out: Path) -> Tensor:
    """`number` pictures at a scale, uint8 [N, 3, 32, 32]."""
    entry = {"image": str(out / "red-circle.png"), "adapter": str(root / "demo-image-prompt"), "scale": scale}
    recipe = {
        "command": "sample",
        "model": str(root / "demo-unet"),
        "prompts": [TEXT],
        "image_prompts": [entry],
        "sampling": {"sampler": "ddim", "steps": 20, "guidance": 2.5, "images_per_prompt": number},
    }
    options = RunOptions(out / f"scale-{scale:g}")
    result = sample.run(SampleRecipe.from_mapping(recipe), options, SilentReporter())
    return torch.stack([read_image(Path(image["file"])) for image in result["images"]])


def main() -> None:
    """Generate, count, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of demo-unet and demo-image-prompt")
    parser.add_argument("-n", type=int, default=100, help="pictures for each scale")
    given = parser.parse_args()
    out = given.runs / "demo-image-prompt-scales"
    image_prompt(out / "red-circle.png")
    print(table({scale: shares(generated(scale, given.n, given.runs, out)) for scale in SCALES}))


if __name__ == "__main__":
    main()
