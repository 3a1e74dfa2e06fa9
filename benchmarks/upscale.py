"""How well a model enlarges held-out pictures: python benchmarks/upscale.py MODEL --shards 'data/val-*.tar' --clip CLIP

Against bicubic enlargement: PSNR, SSIM, Fréchet distance of CLIP features, and the error of the result when it is
shrunk again; each with its 95 % interval, for several levels of noise on the small picture. With --photo, how far the
parts of a large picture differ from one pass, and the memory of both. The result is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm_cli.core.degradation import jpeg, resampled
from ldm_cli.core.pixels import to_bytes, to_signed
from ldm_cli.data.config import DataConfig
from ldm_cli.data.loader import sequential_batches
from ldm_cli.data.open_shards import open_shards
from ldm_cli.evaluation.clip_features import CLIPFeatures
from ldm_cli.evaluation.frechet import FeatureMoments, Gaussian, frechet_distance, frechet_estimates
from ldm_cli.evaluation.image_quality import psnr, ssim
from ldm_cli.evaluation.intervals import NORMAL_QUANTILE, interval, jackknife
from ldm_cli.families.open_family import open_family
from ldm_cli.pictures.grid import image_grid
from ldm_cli.pictures.images import read_image, save_image
from ldm_cli.reporting import SilentReporter
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.request import ImageRequest
from ldm_cli.sampling.upscaling import Upscaling, upscale

_CPU = torch.device("cpu")


def sampling(steps: int) -> SamplingConfig:
    """Deterministic and short: most of what a small picture leaves open is fine detail."""
    return SamplingConfig.from_mapping({"sampler": "ddim", "steps": steps, "timestep_spacing": "trailing"})


def pictures(shards: str, size: int, count: int) -> Iterator[tuple[Tensor, list[str]]]:
    """Batches of held-out pictures, uint8 [B, 3, size, size], and their captions."""
    config = DataConfig(shards=shards, image_size=size, missing_caption="empty")
    for batch in sequential_batches(open_shards(shards, config, SilentReporter()), config, 16, limit=count):
        yield batch.images, batch.captions


class Score:
    """What is measured of one way to enlarge."""

    def __init__(self) -> None:
        self.figures: dict[str, list[Tensor]] = {"psnr": [], "ssim": [], "error when shrunk again, of 255": []}
        self.moments = FeatureMoments()

    def add(self, results: Tensor, truths: Tensor, small: Tensor, shrink: Callable[[Tensor], Tensor]) -> None:
        """Count results uint8 [B, 3, H, W] of small pictures."""
        again = (shrink(results).float() - small.float()).abs().flatten(1).mean(1)
        for values, more in zip(
            self.figures.values(), (psnr(results, truths), ssim(results, truths), again), strict=True
        ):
            values.append(more)

    def summary(self, real: FeatureMoments) -> dict[str, object]:
        """Mean and half of the 95 % interval of each figure; the distance with its own interval."""
        found: dict[str, object] = {}
        for name, parts in self.figures.items():
            values = torch.cat(parts).double()
            found[name] = [float(values.mean()), NORMAL_QUANTILE * float(values.std()) / len(values) ** 0.5]
        return found | frechet_estimates(self.moments, real, "frechet_distance")


def distance_gain(score: FeatureMoments, plain: FeatureMoments, real: FeatureMoments) -> dict[str, object]:
    """By how much the Fréchet distance to the real pictures is less than that of `plain`, and its 95 % interval.

    Picture i of all three sets is the same one. So a tenth of the pictures is left out of all three at once: what a
    picture does to both distances cancels.
    """

    def gain(score: Gaussian, plain: Gaussian, real: Gaussian) -> float:
        return frechet_distance(plain, real) - frechet_distance(score, real)

    found, sets = gain(score.whole.gaussian, plain.whole.gaussian, real.whole.gaussian), (score, plain, real)
    left_out = zip(*(one.gaussians_without_a_group() for one in sets), strict=True)
    _, error = jackknife([[gain(*three) - found for three in left_out]])
    return {"frechet_distance_gain": found, "frechet_distance_gain_interval": interval(found, error)}


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of each way to enlarge, by name."""
    family, clip = open_family(Path(arguments.model)), CLIPFeatures.load(Path(arguments.clip), _CPU)
    plain = Upscaling(family, sampling(arguments.steps))  # type: ignore[arg-type]
    low, scores, real = plain.low, {"bicubic": Score()}, FeatureMoments()
    side, corners = arguments.size // low.factor, low.latent_factor > 1

    def shrink(images: Tensor) -> Tensor:
        return to_bytes(resampled(to_signed(images, _CPU), (side, side), corners=corners))

    shown: list[Tensor] = []
    for truths, captions in pictures(arguments.shards, arguments.size, arguments.count):
        small = shrink(truths)
        if arguments.jpeg:
            small = to_bytes(jpeg(to_signed(small, _CPU), torch.full((len(small),), arguments.jpeg)))
        large = F.interpolate(to_signed(small, _CPU), truths.shape[2:], mode="bicubic", align_corners=corners)
        results = {"bicubic": to_bytes(large)}
        requests = [ImageRequest(caption, seed) for seed, caption in enumerate(captions)]
        for level in arguments.levels:
            asked = Upscaling(plain.family, plain.config, level)
            found = {image.index: image.pixels for image in upscale(asked, list(small), requests)}
            results[f"level {level}"] = torch.stack([found[i] for i in range(len(small))])
        real.add(clip.images(truths))
        for name, images in results.items():
            score = scores.setdefault(name, Score())
            score.add(images, truths, small, shrink)
            score.moments.add(clip.images(images))
        if not shown:
            nearest = small.repeat_interleave(low.factor, 2).repeat_interleave(low.factor, 3)
            shown = [row[i] for i in range(6) for row in (nearest, *results.values(), truths)]
            if arguments.grid:
                save_image(Path(arguments.grid), image_grid(shown, 2 + len(results)))
    summaries = {name: score.summary(real) for name, score in scores.items()}
    for name in scores.keys() - {"bicubic"}:
        summaries[name] |= distance_gain(scores[name].moments, scores["bicubic"].moments, real)
    return summaries


def enlarged_photo(upscaling: Upscaling, picture: Tensor) -> tuple[Tensor, float]:
    """A picture enlarged, and the most memory that it took beyond the model, in MiB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (found,) = upscale(upscaling, [picture], [ImageRequest("", 0)])
    return found.pixels, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def seams(parts: Tensor, whole: Tensor, borders: Sequence[set[int]]) -> dict[str, float]:
    """How a result in parts differs from one pass, of 255.

    A jump is the change of the difference from one line to the next, averaged over colours and 64 pixels of the line.

    Args:
        parts, whole: uint8 [3, H, W].
        borders: rows and columns at which parts begin or end.
    """
    difference = parts.float() - whole.float()
    near, at_borders, elsewhere = [], [], []
    for lines, of_lines in zip((difference, difference.mT), borders, strict=True):
        length = lines.shape[1]
        jumps = lines.mean(dim=0).diff(dim=0).unfold(1, 64, 64).mean(dim=2).abs()
        is_border = torch.tensor([line in of_lines for line in range(1, length)])
        at_borders.append(jumps[is_border].flatten())
        elsewhere.append(jumps[~is_border].flatten())
        near += [lines[:, max(0, border - 8) : border + 8].abs().max() for border in of_lines]
    figures = {"largest": difference.abs().max(), "mean": difference.abs().mean()}
    figures["largest within 8 pixels of a border"] = torch.stack(near).max()
    for name, found in (("at borders", torch.cat(at_borders)), ("elsewhere", torch.cat(elsewhere))):
        figures |= {f"largest jump {name}": found.max(), f"mean jump {name}": found.mean()}
    return {name: float(figure) for name, figure in figures.items()}


def photo_figures(arguments: argparse.Namespace) -> dict[str, Any]:
    """Parts against one pass, and the memory of photos of several sizes; each in a process of its own."""
    picture, family = read_image(Path(arguments.photo)), open_family(Path(arguments.model))
    in_parts, at_once = (
        Upscaling(family, sampling(arguments.steps), tile=tile)  # type: ignore[arg-type]
        for tile in (arguments.tile, 1 << 20)
    )
    height, width = picture.shape[1:]
    asked = {
        "in parts": (in_parts, picture),
        "in parts, a quarter of the picture": (in_parts, picture[:, : height // 2, : width // 2].contiguous()),
        "in one pass": (at_once, picture),
    }
    found = {}
    for name, one in asked.items():
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            found[name] = process.submit(enlarged_photo, *one).result()
    parts, whole = found["in parts"][0], found["in one pass"][0]
    if arguments.grid:
        save_image(Path(arguments.grid), parts)
    tiles = [tile.scaled(in_parts.low.factor) for tile in in_parts.tiles(height, width)]
    rows = {end for tile in tiles for end in (tile.top, tile.top + tile.height)} - {0, parts.shape[1]}
    columns = {end for tile in tiles for end in (tile.left, tile.left + tile.width)} - {0, parts.shape[2]}
    return {
        "size": list(parts.shape[1:]),
        "tile": in_parts.window * in_parts.low.factor,
        "difference": seams(parts, whole, (rows, columns)),
        "memory in MiB": {name: memory for name, (_, memory) in found.items()},
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--shards")
    parser.add_argument("--clip")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--count", type=int, default=160)
    parser.add_argument("--levels", type=int, nargs="*", default=[0, 50])
    parser.add_argument("--jpeg", type=int, help="quality of a compression of the small pictures")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--photo")
    parser.add_argument("--tile", type=int, help="side of the parts; that of the product where nothing is given")
    parser.add_argument("--grid", help="write pictures here")
    arguments = parser.parse_args()
    json.dump((photo_figures if arguments.photo else measured)(arguments), sys.stdout, indent=1)


if __name__ == "__main__":
    main()
