"""How wide the edges of flat shapes are: `python benchmarks/edges.py runs/cascade-samples "data/cascade/val-*.tar"`.

Each argument is a folder of pictures, or shards. With d the step between neighbouring pixels, as a part of the largest
step between two colours of the picture, an edge is Σd / Σd² pixels wide: 1 where the colour changes between two pixels,
w where it changes evenly over w. Steps below a twentieth are noise and do not count.
"""

from __future__ import annotations

import argparse
import tarfile
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev

import torch
from PIL import Image
from torch import Tensor

from ldm_cli.evaluation.intervals import NORMAL_QUANTILE
from ldm_cli.pictures.images import from_pillow, read_image

_NOISE = 0.05


def edge_width(image: Tensor) -> float:
    """Mean width of the edges of a picture, uint8 [3, H, W], in pixels; nan without an edge."""
    pixels = image.double()
    ground = torch.cat([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], dim=1).median(dim=1).values
    contrast = (pixels - ground[:, None, None]).norm(dim=0).flatten().topk(8).values.median()
    steps = torch.cat([pixels.diff(dim=axis).norm(dim=0).flatten() for axis in (1, 2)]) / contrast
    steps = steps[steps > _NOISE]
    return float(steps.sum() / steps.square().sum())


def pictures(place: str, count: int) -> Iterator[Tensor]:
    """The first pictures of a folder or of shards, uint8 [3, H, W]."""
    if Path(place).is_dir():
        files = [file for file in sorted(Path(place).glob("*.png")) if file.name[0].isdigit()]
        yield from map(read_image, files[:count])
        return
    for shard in sorted(Path(place).parent.glob(Path(place).name)):
        with tarfile.open(shard) as archive:
            for member in archive:
                if member.name.endswith((".png", ".jpg", ".webp")) and count:
                    count -= 1
                    file = archive.extractfile(member)
                    assert file is not None
                    yield from_pillow(Image.open(file).convert("RGB"))[0]


def main() -> None:
    """Print the widths in pixels and in sides of the picture, with 95 % intervals."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("places", nargs="+")
    parser.add_argument("--count", type=int, default=200)
    given = parser.parse_args()
    print("| pictures | side | edges in pixels | in thousandths of the side |\n|---|---|---|---|")
    for place in given.places:
        found = list(pictures(place, given.count))
        side = found[0].shape[-1]
        widths = [edge_width(image) for image in found]
        half = NORMAL_QUANTILE * stdev(widths) / len(widths) ** 0.5
        cells = [f"{mean(widths) * unit:.2f} ± {half * unit:.2f}" for unit in (1, 1000 / side)]
        print(f"| {place} ({len(widths)}) | {side} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
