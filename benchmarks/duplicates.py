"""How many planted copies of drawn scenes are found, and what else is: python benchmarks/duplicates.py --out FOLDER

Copies are saved again as JPEG, cropped by 5 %, mirrored, or resized. They are looked for by signatures, and with --clip
by the embeddings of a CLIP. With --sizes, time and memory of the search among so many random vectors. The result is
JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import resource
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ldm_cli.data.config import DataConfig
from ldm_cli.data.duplicates import picture_pairs
from ldm_cli.data.near_pairs import Pairs, near_pairs
from ldm_cli.data.open_shards import open_shards
from ldm_cli.data.sample_decoder import Draw, SampleDecoder, Wanted
from ldm_cli.data.scenes import write_scenes
from ldm_cli.data.shard_writer import write_shard
from ldm_cli.formats.embedding_files import open_embeddings
from ldm_cli.reporting import SilentReporter
from ldm_cli.stages import clip_embed
from ldm_cli.stages.support.clip_inputs import ClipOptions

KINDS = ("jpeg", "cropped", "mirrored", "resized")
_SIZE = 64
_TOLERANCE = 0.05 + 1 / _SIZE  # a crop by 5 %, and a pixel


def copied(data: bytes, kind: str, dice: random.Random) -> tuple[str, bytes]:
    """Extension and content of a copy of a picture file."""
    image, target = Image.open(io.BytesIO(data)).convert("RGB"), io.BytesIO()
    width, height = image.size
    if kind == "cropped":
        part = round(0.95 * width), round(0.95 * height)
        left, top = dice.randint(0, width - part[0]), dice.randint(0, height - part[1])
        image = image.crop((left, top, left + part[0], top + part[1]))
    elif kind == "mirrored":
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    elif kind == "resized":
        image = image.resize((round(0.6 * width), round(0.6 * height)), Image.Resampling.BICUBIC)
    image.save(target, "JPEG" if kind == "jpeg" else "PNG", **({"quality": 70} if kind == "jpeg" else {}))
    return ("jpg" if kind == "jpeg" else "png"), target.getvalue()


def plant(folder: Path, num_scenes: int, num_copies: int) -> list[dict[str, Any]]:
    """Scenes and copies of some as shards in `folder`; the truths of all in order, with `kind` and `of` of copies."""
    reporter = SilentReporter()
    write_scenes(folder, num_scenes, _SIZE, 5, reporter, val_samples=1)
    config = DataConfig(shards=str(folder / "train-*.tar"))
    shards, dice = open_shards(config.shards, config, reporter), random.Random(0)
    places = [(shard, number) for shard, size in enumerate(shards.sizes) for number in range(size)]
    chosen = dice.sample(range(len(places)), num_copies)
    with closing(SampleDecoder(shards, config, Wanted(image=False, metadata=True))) as decoder:
        truths = [decoder.decode(*place, Draw()).metadata or {} for place in places]

        def copies() -> Iterator[dict[str, Any]]:
            for number, original in enumerate(chosen):
                kind = KINDS[number % len(KINDS)]
                extension, data = copied(decoder.image_bytes(*places[original]), kind, dice)
                truths.append({**truths[original], "kind": kind, "of": original})
                yield {"__key__": f"{number:05d}", extension: data, "txt": b"a copy"}

        write_shard(folder / "zz-copies.tar", copies())
    return truths


def is_alike(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether one scene may be a copy of the other as far as their truths tell: a crop moves what is in it."""

    def words(truth: dict[str, Any]) -> list[Any]:
        return [truth["background"], *sorted((one["shape"], one["color"]) for one in truth["objects"])]

    def places(truth: dict[str, Any], mirror: bool) -> list[tuple[Any, ...]]:
        rows = [(one["shape"], one["color"], *one["center"], one["radius"]) for one in truth["objects"]]
        return sorted((s, c, 1 - x if mirror else x, y, r) for s, c, x, y, r in rows)

    return words(a) == words(b) and any(
        all(abs(p - q) <= _TOLERANCE for one, two in zip(places(a, mirror), places(b, False), strict=True)
            for p, q in zip(one[2:], two[2:], strict=True))
        for mirror in (False, True)
    )  # fmt: skip


def measured(pairs: Pairs, truths: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Recall of the copies by kind; of the pairs with a copy, the share with its original, and with a scene alike."""
    first, second = pairs.first.tolist(), pairs.second.tolist()
    totals = Counter(truth["kind"] for truth in truths if "kind" in truth)
    found, alike, partners = Counter[str](), Counter[str](), Counter[str]()
    num_alike = 0
    for a, b in zip(first, second, strict=True):
        kind, is_like = truths[b].get("kind"), is_alike(truths[a], truths[b])
        num_alike += is_like
        if kind:
            partners[kind] += 1
            found[kind] += truths[b]["of"] == a
            alike[kind] += is_like
    result: dict[str, Any] = {
        "pairs": len(first),
        "share_alike": num_alike / max(1, len(first)),
        "search_recall": pairs.recall,
    }
    for kind, total in totals.items():
        result[kind] = {"recall": found[kind] / total, "precision": found[kind] / max(1, partners[kind])}
        result[kind]["share_alike"] = alike[kind] / max(1, partners[kind])
    return result


def growth(size: int) -> dict[str, Any]:
    """Time and memory of the search among `size` vectors of 512 around 200 themes, one of a hundred a copy."""
    generator, width = torch.Generator().manual_seed(0), 512
    themes = 0.7 * torch.randn(200, width, generator=generator) + 0.6
    vectors = 0.8 * torch.randn(size, width, generator=generator)
    for rows in vectors.split(10_000):
        rows += themes[torch.randint(200, (len(rows),), generator=generator)]
    num_copies = size // 100
    vectors[-num_copies:] = vectors[:num_copies] + 0.36 * torch.randn(num_copies, width, generator=generator)
    memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    pairs = near_pairs(vectors, [vectors.__getitem__], 0.93, SilentReporter())
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    seconds = time.perf_counter() - start
    return {
        "vectors": size,
        "seconds": seconds,
        "more_mib": more // 1024,
        "copies": num_copies,
        "pairs": len(pairs.first),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for scenes and embeddings")
    parser.add_argument("--scenes", type=int, default=20_000)
    parser.add_argument("--copies", type=int, default=500)
    parser.add_argument("--thresholds", type=float, nargs="*", default=(0.98, 0.99, 0.995))
    parser.add_argument("--clip", help="a CLIP; its thresholds are --thresholds as well")
    parser.add_argument("--sizes", type=int, nargs="*", default=(), help="such as 10000 100000 1000000")
    given = parser.parse_args()
    truths = plant(given.out, given.scenes, given.copies)
    shards = (str(given.out / "train-*.tar"), str(given.out / "zz-copies.tar"))
    result: dict[str, Any] = {"growth": [growth(size) for size in given.sizes]}
    for threshold in given.thresholds:
        _, pairs = picture_pairs(
            [open_shards(shards, DataConfig(shards=shards), SilentReporter())],
            DataConfig(shards=shards),
            threshold,
            SilentReporter(),
        )
        result[f"signatures {threshold}"] = measured(pairs, truths)
    if given.clip:
        file = given.out / "embeddings.npy"
        clip_embed.run(shards, None, file, ClipOptions(given.clip), SilentReporter(), overwrite=True)
        vectors = open_embeddings(file).vectors
        for threshold in given.thresholds:
            pairs = near_pairs(vectors, [vectors.__getitem__], threshold, SilentReporter())
            result[f"clip {threshold}"] = measured(pairs, truths)
    print(json.dumps(result, indent=2))
