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
from collections.abc import Callable, Iterator
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
from ldm_cli.evaluation.frechet import FeatureMoments, frechet_estimates
from ldm_cli.evaluation.image_quality import psnr, ssim
from ldm_cli.evaluation.intervals import NORMAL_QUANTILE
from ldm_cli.families.open_family import open_family
from ldm_cli.pictures.grid import image_grid
from ldm_cli.pictures.images import read_image, save_image
from ldm_cli.reporting import SilentReporter
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.request import ImageRequest
from ldm_cli.sampling.tiling import window_starts
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
    return {name: score.summary(real) for name, score in scores.items()}


def enlarged_photo(model: str, photo: str, steps: int, tile: int, share: float) -> tuple[Tensor, float]:
    """A photo, or the upper left of it, enlarged; and the most memory that it took beyond the model, in MiB."""
    upscaling = Upscaling(open_family(Path(model)), sampling(steps), tile=tile)  # type: ignore[arg-type]
    picture = read_image(Path(photo))
    picture = picture[:, : int(picture.shape[1] * share), : int(picture.shape[2] * share)].contiguous()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (found,) = upscale(upscaling, [picture], [ImageRequest("", 0)])
    return found.pixels, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def seams(parts: Tensor, whole: Tensor, tile: int) -> dict[str, float]:
    """Differences of two results uint8 [3, H, W], of 255: the largest, the mean, and the largest jump of the difference
    across a line, averaged over colours and 64 pixels of the line: where parts begin or end, and elsewhere."""
    difference = (parts.float() - whole.float()).mean(dim=0)
    at_seams, elsewhere = [], []
    for lines in (difference, difference.T):
        length, width = lines.shape
        starts = window_starts(length, tile, tile // 4)
        borders = {start for start in starts if start} | {start + tile for start in starts if start + tile < length}
        jumps = lines.diff(dim=0)[:, : width // 64 * 64].reshape(length - 1, -1, 64).mean(dim=2).abs().amax(dim=1)
        at_seams += [float(jumps[border - 1]) for border in borders]
        elsewhere += [float(jump) for line, jump in enumerate(jumps, start=1) if line not in borders]
    every = (parts.float() - whole.float()).abs()
    return {
        "largest": float(every.max()),
        "mean": float(every.mean()),
        "seam": max(at_seams),
        "the same across the middle one of all other lines": sorted(elsewhere)[len(elsewhere) // 2],
    }


def photo_figures(arguments: argparse.Namespace) -> dict[str, Any]:
    """Parts against one pass, and the memory of photos of several sizes; each in a process of its own."""

    def alone(tile: int, share: float) -> tuple[Tensor, float]:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            asked = (arguments.model, arguments.photo, arguments.steps, tile, share)
            return process.submit(enlarged_photo, *asked).result()

    tile = arguments.tile
    parts, memory = alone(tile, 1.0)
    small = alone(tile, 0.5)[1]
    whole, memory_of_whole = alone(1 << 20, 1.0)
    if arguments.grid:
        save_image(Path(arguments.grid), parts)
    mib = {"in parts": memory, "in parts, a quarter of the picture": small, "in one pass": memory_of_whole}
    return {"size": list(parts.shape[1:]), "tile": tile, "difference": seams(parts, whole, tile), "memory in MiB": mib}


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
    parser.add_argument("--tile", type=int, default=256)
    parser.add_argument("--grid", help="write pictures here")
    arguments = parser.parse_args()
    json.dump((photo_figures if arguments.photo else measured)(arguments), sys.stdout, indent=1)


if __name__ == "__main__":
    main()
