"""Synthetic scenes: flat shapes with captions and full ground truth, as data to try every command on.

A scene is a pure function of (seed, split, index): the same at every image size and in every process. The pairs of
`HELD_OUT_PAIRS` never occur in `train`. In `val` every eighth scene has one, and the others have pairs that occur in
`train`, so that composition is measured apart from memory.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from ldm_cli.data import scene_vocabulary as words
from ldm_cli.data.scene_captions import FULL_FRACTION, caption
from ldm_cli.data.scene_drawing import paint
from ldm_cli.data.scene_folder import prepare, write_record
from ldm_cli.data.shard_writer import write_shard
from ldm_cli.data.workers import made_by_workers
from ldm_cli.reporting import Reporter
from ldm_cli.storage import TEMPORARY_PREFIX

Split = Literal["train", "val"]
Truth = dict[str, Any]
_Shard = tuple[str, Split, range]

VERSION = 2
"""Rises whenever the same seed gives other scenes."""
TWO_OBJECT_FRACTION = 0.25
"""Fraction of scenes with two objects and a relation."""
HELD_OUT_EVERY = 8
"""One of so many scenes of `val` has a held-out pair, which is the share of those pairs among all."""
_PATIENCE = 3600.0
"""Seconds that a shard may take."""
MIN_SIZE = 32
"""Pixels below which shapes look alike."""


@dataclass(frozen=True)
class Scene:
    """A picture, a sentence about it, and its ground truth.

    Attributes:
        image: square RGB image.
        caption: one English sentence without a full stop.
        truth: JSON-able. `objects`: one or two of {shape, color, size, place (None in scenes of two), center
            [x, y], radius, box [left, top, right, bottom]}, lengths in image sides; `relation` of the first to the
            second, or None; `background`; `num_objects`; `caption`; `stated`: the attributes that the caption names;
            `split`; `held_out`: whether it has a (shape, colour) pair that `train` lacks. `shape`, `color`, `size` and
            `place` of a single object are repeated at the top level as labels; they are None in scenes of two.
    """

    image: Image.Image
    caption: str
    truth: Truth


class _Dice:
    """Random choices from `Random.random()` alone, the one generator Python promises never to change."""

    def __init__(self, seed: int, split: str, index: int) -> None:
        digest = hashlib.sha256(f"scene\0{seed}\0{split}\0{index}".encode()).digest()
        self._random = random.Random(int.from_bytes(digest, "little")).random

    def chance(self, probability: float) -> bool:
        return self._random() < probability

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self._random()

    def pick(self, options: Sequence[Any]) -> Any:
        return options[int(self._random() * len(options))]


def _pairs(dice: _Dice, count: int, choices: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """`count` different (shape, colour) pairs, one of them among `choices`."""
    pairs = [dice.pick(choices)]
    while len(pairs) < count:
        pair = dice.pick(words.SEEN_PAIRS)
        if pair != pairs[0]:
            pairs.append(pair)
    return pairs[::-1] if count == 2 and dice.chance(0.5) else pairs


def _geometry(size: str, place: str | None, x: float, y: float, radius: float) -> Truth:
    # Rounded before painting, so that the recorded numbers are exactly those of the picture.
    return {"size": size, "place": place, "center": [round(x, 4), round(y, 4)], "radius": round(radius, 4)}


def _single_geometry(dice: _Dice) -> list[Truth]:
    place, size = dice.pick(words.PLACE_NAMES), dice.pick(words.SIZE_NAMES)
    x, y = (c + dice.between(-words.PLACE_JITTER, words.PLACE_JITTER) for c in words.PLACES[place])
    return [_geometry(size, place, x, y, dice.between(*words.SIZES[size]))]


def _pair_geometry(dice: _Dice, relation: str) -> list[Truth]:
    """Two small objects on opposite sides of the middle, with a gap between them."""
    drift = dice.between(-words.PAIR_DRIFT, words.PAIR_DRIFT)
    dx, dy = words.RELATIONS[relation]
    objects = []
    for side in (1.0, -1.0):
        along = side * (words.PAIR_DISTANCE + dice.between(-words.PAIR_JITTER, words.PAIR_JITTER))
        across = drift + dice.between(-words.PAIR_OWN_DRIFT, words.PAIR_OWN_DRIFT)
        x, y = 0.5 + dx * along + abs(dy) * across, 0.5 + dy * along + abs(dx) * across
        objects.append(_geometry("small", None, x, y, dice.between(*words.SIZES["small"])))
    return objects


def scene(
    seed: int,
    index: int,
    split: Split,
    size: int,
    two_object_fraction: float = TWO_OBJECT_FRACTION,
    only: str | None = None,
) -> Scene:
    """The `index`-th scene of a split.

    Args:
        seed: any integer; other seeds give unrelated scenes.
        index: from 0; in `val`, every `HELD_OUT_EVERY`-th scene has a held-out (shape, colour) pair.
        split: `train` or `val`.
        size: side of the square image in pixels, at least `MIN_SIZE`; the content does not depend on it.
        two_object_fraction: chance of two objects, in [0, 1].
        only: see `scene_vocabulary.pairs_with`; the first object or the second has such a pair.

    Raises:
        ValueError: if the size is too small.
        UsageError: as in `pairs_with`.
    """
    if size < MIN_SIZE:
        raise ValueError(f"scene: size={size} is below the least, {MIN_SIZE}")
    dice = _Dice(seed, split, index)
    held_out = only is None and split == "val" and index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    relation = dice.pick(words.RELATION_NAMES) if dice.chance(two_object_fraction) else None
    background = dice.pick(words.BACKGROUND_NAMES)
    geometry = _single_geometry(dice) if relation is None else _pair_geometry(dice, relation)
    choices = sorted(words.HELD_OUT_PAIRS) if held_out else words.SEEN_PAIRS
    pairs = _pairs(dice, len(geometry), choices if only is None else words.pairs_with(only))
    objects: list[Truth] = []
    image, palette = Image.new("RGB", (size, size), words.BACKGROUNDS[background]), words.COLORS | words.NEW_COLORS
    for (shape, color), place in zip(pairs, geometry, strict=True):
        box = paint(image, shape, palette[color], (place["center"][0], place["center"][1]), place["radius"])
        objects.append({"shape": shape, "color": color, **place, "box": [round(edge, 4) for edge in box]})
    sentence, stated = caption(objects, relation, background, dice.chance(FULL_FRACTION), dice.pick)
    labels = {name: objects[0][name] if relation is None else None for name in ("shape", "color", "size", "place")}
    truth: Truth = {
        "caption": sentence,
        "stated": list(stated),
        "num_objects": len(objects),
        **labels,
        "background": background,
        "relation": relation,
        "objects": objects,
        "split": split,
        "held_out": held_out,
    }
    return Scene(image, sentence, truth)


def write_scenes(
    out: Path,
    samples: int,
    size: int,
    seed: int,
    reporter: Reporter,
    *,
    val_samples: int | None = None,
    shard_samples: int = 2000,
    two_object_fraction: float = TWO_OBJECT_FRACTION,
    only: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write scenes as WebDataset shards: `train-000000.tar`, …, `val-000000.tar`, …. A sample is a png, a txt and a
    json.

    The bytes depend only on the arguments and the PNG encoder. The same call completes an interrupted one.

    Args:
        out: folder, made if missing.
        samples: scenes of `train`, at least 1.
        size: side of the images in pixels.
        val_samples: scenes of `val`; None: a tenth of `samples`, at least 64.
        two_object_fraction: chance of two objects in a scene, in [0, 1].
        only: `color=NAME` or `shape=NAME`, which every scene then has; see `scene_vocabulary.pairs_with`.
        overwrite: replace scenes of other arguments.

    Returns:
        The content of `scenes.json`; `complete` is True.

    Raises:
        ValueError: if a count is below 1 or the size too small.
        UsageError: as in `pairs_with`.
        OutputError: if `out` holds other scenes and `overwrite` is False, or cannot be written to.
        StorageError: the disk is full.
    """
    num_val = max(64, samples // 10) if val_samples is None else val_samples
    if min(samples, num_val, shard_samples) < 1 or size < MIN_SIZE:
        raise ValueError(f"{samples=}, {num_val=}, {shard_samples=} must be at least 1, {size=} at least {MIN_SIZE}")
    make = partial(scene, seed, size=size, two_object_fraction=two_object_fraction, only=only)
    make(0, "train")  # fails before anything is written
    shards = [*_shards("train", samples, shard_samples), *_shards("val", num_val, shard_samples)]
    record: dict[str, Any] = {
        "generator": f"ldm scenes {VERSION}",
        "samples": samples,
        "val_samples": num_val,
        "size": size,
        "seed": seed,
        "two_object_fraction": two_object_fraction,
        "shards": {name: len(indices) for name, _, indices in shards},
    } | ({} if only is None else {"only": only})
    if prepare(out, record, overwrite):
        _write_shards(out, shards, make, reporter)
        write_record(out, {**record, "complete": True})
    else:
        reporter.info(f"{out}: these scenes are already there")
    return {**record, "complete": True}


def _shards(split: Split, count: int, shard_samples: int) -> list[_Shard]:
    """Name, split and scene indices of each shard of a split."""
    starts = range(0, count, shard_samples)
    return [
        (f"{split}-{i:06d}.tar", split, range(start, min(count, start + shard_samples)))
        for i, start in enumerate(starts)
    ]


def _write_shards(out: Path, shards: Sequence[_Shard], make: Callable[..., Scene], reporter: Reporter) -> None:
    write, total = partial(_write_shard, out, shards, make), sum(len(indices) for _, _, indices in shards)
    with (
        reporter.progress("writing scenes", total, unit="scene") as progress,
        closing(_on_all_cores(write, len(shards), out)) as written,
    ):
        for done in accumulate(written):
            progress.update(done)


def _on_all_cores(write: Callable[[int], int], count: int, folder: Path) -> Generator[int]:
    """`write(n)` for each n below `count`, in any order; when one fails, no partial file stays in `folder`."""
    num_workers = min(count, len(os.sched_getaffinity(0)))
    if num_workers == 1:
        yield from map(write, range(count))
        return
    try:
        yield from made_by_workers(write, range(count), num_workers=num_workers, num_ahead=2, timeout=_PATIENCE)
    finally:  # the workers have been killed, whatever they were writing
        for unfinished in folder.glob(f"{TEMPORARY_PREFIX}*"):
            unfinished.unlink(missing_ok=True)


def _write_shard(out: Path, shards: Sequence[_Shard], make: Callable[..., Scene], number: int) -> int:
    """Write shard `number` of `shards`; returns its number of scenes."""
    name, split, indices = shards[number]
    scenes = (make(index, split) for index in indices)
    return write_shard(out / name, (_members(index, one) for index, one in zip(indices, scenes, strict=True)))


def _members(index: int, one: Scene) -> dict[str, Any]:
    png = io.BytesIO()
    one.image.save(png, format="PNG")
    text = json.dumps(one.truth, separators=(",", ":")).encode()
    return {"__key__": f"{index:09d}", "png": png.getvalue(), "txt": one.caption.encode(), "json": text}
