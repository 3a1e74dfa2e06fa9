"""Speed of the input pipeline: 256 px JPEGs to batches of 64 and 224 px, reading alone, indexing and resuming."""

from __future__ import annotations

import itertools
import random
import tempfile
from contextlib import closing
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from ldm_cli.bench import peers
from ldm_cli.bench.race import Contender, Runner, race, speed
from ldm_cli.data.config import DataConfig
from ldm_cli.data.loader import Loader
from ldm_cli.data.open_shards import open_shards
from ldm_cli.data.pack import pack
from ldm_cli.data.shards import ShardReader
from ldm_cli.data.tar_index import index_tar
from ldm_cli.reporting import SilentReporter

_BATCH_SIZE, _WORKERS = 64, 2
_PASSES = 10
_READING, _INDEXING = "reading alone", "indexing"
_OF_ONE_THREAD = (_READING, _INDEXING)


def our_loader(folder: str, size: int, images: int) -> Runner:
    """Our loader with two workers; a step is an epoch."""
    config = DataConfig(shards=folder, image_size=size, num_workers=_WORKERS)
    loader = Loader(open_shards(folder, config, SilentReporter()), config, seed=0, batch_size=_BATCH_SIZE)

    def epoch() -> None:
        for _ in loader.batches(0, images // _BATCH_SIZE):
            pass

    return Runner(epoch, images // _BATCH_SIZE * _BATCH_SIZE)


def our_reader(folder: str, images: int) -> Runner:
    """Reads every member of every sample through the index; a step opens the shards and reads an epoch."""
    config = DataConfig(shards=folder)

    def epoch() -> None:
        shards = open_shards(folder, config, SilentReporter())
        reader = ShardReader(shards)
        for number, index in enumerate(shards.indexes):
            for sample in range(index.num_samples):
                reader.read_all(number, [*itertools.chain.from_iterable(index.sample(sample).values())])
        reader.close()

    return Runner(epoch, images)


def our_indexer(shards: list[str], images: int) -> Runner:
    """Builds the index of every shard from its headers; a step is several passes over all shards."""

    def passes() -> None:
        for shard in shards * _PASSES:
            index_tar(Path(shard))

    return Runner(passes, images * _PASSES)


def first_batch(folder: str, images: int, epoch: int) -> Runner:
    """A resumed run from its start to its first batch, at the beginning of an epoch and with a cached index."""
    config = DataConfig(shards=folder, image_size=64)
    first = epoch * images // _BATCH_SIZE

    def step() -> None:
        shards = open_shards(folder, config, SilentReporter())
        loader = Loader(shards, config, seed=0, batch_size=_BATCH_SIZE)
        with closing(loader.batches(first, first + 1)) as batches:
            next(batches)

    return Runner(step, _BATCH_SIZE)


def measure(images: int, rounds: int, compared: bool) -> list[dict[str, Any]]:
    """One row per work and contender."""
    images = max(_BATCH_SIZE, images // _BATCH_SIZE * _BATCH_SIZE)
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(_write(Path(scratch), images))
        shards = [str(path) for path in sorted(Path(folder).glob("*.tar"))]
        works = {
            f"256 px JPEG to {size} px, {_WORKERS} workers": [
                Contender("ldm", our_loader, (folder, size, images)),
                Contender("webdataset", peers.their_loader, (shards, size, _BATCH_SIZE, images, _WORKERS)),
            ]
            for size in (64, 224)
        }
        works[_READING] = [
            Contender("ldm", our_reader, (folder, images)),
            Contender("webdataset", peers.their_reader, (shards, images)),
        ]
        if not compared:
            works = {work: field[:1] for work, field in works.items()}
        works[_INDEXING] = [Contender("ldm", our_indexer, (shards, images))]
        works["first batch after a start"] = [
            Contender("ldm", first_batch, (folder, images, 0)),
            Contender("ldm at epoch 100", first_batch, (folder, images, 100)),
        ]
        rows = []
        for work, field in works.items():
            laps = race(field, rounds=rounds, warmup=1, one_processor=work in _OF_ONE_THREAD)
            rows += [{"work": work} | speed(name, lap, laps["ldm"]) for name, lap in laps.items()]
    return rows


def _write(scratch: Path, images: int) -> Path:
    """Shards of 256 px JPEGs of about 27 KB with captions."""
    source, out, dice = scratch / "source", scratch / "shards", random.Random(0)
    source.mkdir()
    for number in range(images):
        coarse = Image.frombytes("RGB", (24, 24), dice.randbytes(24 * 24 * 3)).resize(
            (256, 256), Image.Resampling.BICUBIC
        )
        grain = Image.frombytes("RGB", (256, 256), dice.randbytes(256 * 256 * 3))
        buffer = BytesIO()
        Image.blend(coarse, grain, 0.08).save(buffer, "JPEG", quality=90)
        (source / f"{number:06}.jpg").write_bytes(buffer.getvalue())
        (source / f"{number:06}.txt").write_text(f"picture {number}\n", encoding="utf-8")
    pack(source, out, SilentReporter(), shard_samples=max(1, -(-images // 4)))
    return out
