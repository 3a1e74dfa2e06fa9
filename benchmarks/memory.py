"""How memory grows in a long training: python benchmarks/memory.py --steps 2000

The real commands train very small models on synthetic scenes; the result is JSON.
Loader, loss, optimizer, average, log, validation, pictures and checkpoints are those of any run. Each training has its
own process, whose memory is read whenever it logs.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import linear_regression
from typing import Any, cast

import torch

from ldm_cli.data.scenes import write_scenes
from ldm_cli.recipe.load import load_recipe
from ldm_cli.recipe.train_recipe import TrainRecipe
from ldm_cli.reporting import Figure, SilentReporter
from ldm_cli.stages import trainer_stage
from ldm_cli.stages.support.options import RunOptions

_SMALL: Mapping[str, tuple[str, ...]] = {
    "demo/clip": (
        *(
            f"clip.{tower}.{field}"
            for tower in ("text_config", "vision_config")
            for field in ("hidden_size=32", "intermediate_size=64", "num_hidden_layers=1")
        ),
        "clip.projection_dim=32",
        "clip.text_config.projection_dim=32",
        "clip.vision_config.projection_dim=32",
        "train.ema_decay=0.99",
    ),
    "demo/vae": ("vae.block_out_channels=[8,8,16]",),
    "demo/unet": (
        "unet.block_out_channels=[16,32]",
        "unet.cross_attention_dim=32",
        "samples.sampling.steps=2",
    ),
}
"""Recipe → changes for a step of milliseconds. The U-Net is the last one, as it uses the other two models."""
_SETTLING = 200
"""First steps that do not count, as allocators, caches and pictures still grow to their final size."""
_FEWEST = 4
_FLAT = 1.0
"""Largest growth that counts as flat, in MiB per 1,000 steps: 1 GiB in a million steps."""
_LARGE_PAGE = 2.125
"""Growth of resident memory in MiB by one large page of the heap and a few small ones."""
_MIB = 2**20


def readings_of(recipe: str, changes: Sequence[str], folder: str, device: str) -> Mapping[str, list[tuple[int, int]]]:
    """Train from beginning to end in this process: the readings of its memory."""
    loaded = cast("TrainRecipe", load_recipe(recipe, changes).recipe)
    readings = Readings(loaded.name, device)
    trainer_stage(loaded.command).run(loaded, RunOptions(out=Path(folder), device=device), readings)
    return readings.points


class Readings(SilentReporter):
    """Reads this process's memory at every logged step of the training with this title."""

    def __init__(self, title: str, device: str) -> None:
        super().__init__()
        self.title, self.device = title, device
        self.points: dict[str, list[tuple[int, int]]] = {}
        """Kind of memory → (step, bytes) of each reading."""

    @contextmanager
    def progress(self, title: str, total: int | None, done: int = 0, unit: str = "step") -> Iterator[Any]:
        """Receive the progress of the training, and ignore all others."""
        with super().progress(title, total, done, unit) as silence:
            yield self if title == self.title else silence

    def update(self, done: int, figures: Mapping[str, Figure] | None = None) -> None:
        """Read the memory, where there are figures."""
        if figures is None:
            return
        sizes = {"resident": resident_bytes(), "allocated": allocated_bytes()}
        if self.device == "cuda":
            sizes["allocated_on_device"] = torch.cuda.memory_allocated()
        for kind, size in sizes.items():
            if size is not None:
                self.points.setdefault(kind, []).append((done, size))


class _MallocInfo(ctypes.Structure):
    """`struct mallinfo2` of malloc.h."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def resident_bytes() -> int | None:
    """Resident bytes of this process; None where /proc does not report them."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else None


def allocated_bytes() -> int | None:
    """Bytes that malloc has allocated and not freed, without gaps between them; None if it does not report them."""
    try:
        mallinfo = ctypes.CDLL("libc.so.6").mallinfo2
    except (OSError, AttributeError):
        return None
    mallinfo.restype = _MallocInfo
    info = mallinfo()
    return int(info.uordblks + info.hblkhd)


def memory(steps: int, device: str) -> list[dict[str, Any]]:
    """One row per trainer and kind of memory: `resident`; `allocated` of it by malloc; on a GPU `allocated_on_device`.

    Args:
        steps: of each training.

    Returns:
        The result of `trend` for each.

    Raises:
        ValueError: there are too few steps for a slope.
    """
    if steps < _FEWEST:
        raise ValueError(f"{steps} steps are too few for a slope, which takes {_FEWEST}")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_scenes(folder / "data", 256, 32, 0, SilentReporter(), val_samples=16)
        for recipe, changes in _SMALL.items():
            print(f"training {recipe} for {steps:,} steps", file=sys.stderr)
            words = [*changes, *_shared(folder, steps)]
            if recipe == "demo/unet":
                words += [f"vae={folder / 'demo/vae/model'}", f"text_encoder={folder / 'demo/clip/model'}"]
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                found = process.submit(readings_of, recipe, words, str(folder / recipe), device).result()
            for kind, points in found.items():
                rows.append({"work": recipe, "memory": kind} | trend(points))
    return rows


def _shared(folder: Path, steps: int) -> list[str]:
    """Changes to every recipe: data, a small batch, and several validations, pictures and checkpoints in a run."""
    often, seldom = max(1, steps // 100), max(1, steps // 10)
    return [
        f"data.shards={folder}/data/train-*.tar",
        f"data.val_shards={folder}/data/val-*.tar",
        f"train.steps={steps}",
        "train.warmup_steps=1",
        "train.batch_size=4",
        "train.optimizer=adamw",
        "train.validation_samples=8",
        f"train.log_every={often}",
        f"train.save_every={seldom}",
        f"train.validate_every={seldom}",
        f"train.sample_every={seldom}",
    ]


def trend(points: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Development of memory after the first 200 steps, or the first half of a shorter run.

    Args:
        points: (step, bytes), in order.

    Returns:
        `steps`; `mib`, about ten of the counted readings with the last one; `mib_per_1000_steps`, the least-squares
        slope of all counted readings; `in_second_half`, the slope in the second half of the run; `flat`, whether the
        latter is small. A leak continues in the second half, while gaps in the heap are filled by then. The first use
        of one large page does not count.
    """
    last = points[-1][0]
    settled = [(step, size / _MIB) for step, size in points if step > min(_SETTLING, last // 2)]
    every = max(1, len(settled) // 10)
    second_half = [point for point in settled if point[0] >= last // 2]
    return {
        "steps": last,
        "mib": [round(size, 1) for _, size in settled[::-every][::-1]],
        "mib_per_1000_steps": _per_1000_steps(settled),
        "in_second_half": _per_1000_steps(second_half),
        "flat": _per_1000_steps(_without_a_page(second_half)) <= _FLAT,
    }


def _without_a_page(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The readings without the largest rise between two of them, if it can be one large page."""
    rises = [later - earlier for (_, earlier), (_, later) in pairwise(points)]
    largest = max(rises)
    jump = largest if _LARGE_PAGE / 2 < largest <= _LARGE_PAGE else 0.0
    at = rises.index(largest)
    return [(step, size - jump if number > at else size) for number, (step, size) in enumerate(points)]


def _per_1000_steps(points: Sequence[tuple[int, float]]) -> float:
    return 1000 * linear_regression(*zip(*points, strict=True)).slope


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="steps of each training")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    given = parser.parse_args()
    print(json.dumps(memory(given.steps, given.device), indent=2))
