"""Speed of the input pipeline: 256 px JPEGs to batches of 64 and 224 px, reading alone, indexing and resuming."""

from __future__ import annotations

import itertools
import random
import tempfile
from contextlib import closing
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image

from ldm_cli.bench import peers
from ldm_cli.bench.race import Contender, race, speedup
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


class OurLoader:
    """Our loader with two workers; a step is an epoch."""

    def __init__(self, folder: str, size: int, images: int) -> None:
        config = DataConfig(shards=folder, image_size=size, num_workers=_WORKERS)
        self.loader = Loader(open_shards(folder, config, SilentReporter()), config, seed=0, batch_size=_BATCH_SIZE)
        self.images = images

    def step(self) -> None:
        """One epoch."""
        for _ in self.loader.batches(0, self.images // _BATCH_SIZE):
            pass

    def facts(self) -> dict[str, Any]:
        """Images an epoch."""
        return {"units": self.images // _BATCH_SIZE * _BATCH_SIZE}


class OurReader:
    """Reads every member of every sample through the index; a step opens the shards and reads an epoch."""

    def __init__(self, folder: str, images: int) -> None:
        self.config = DataConfig(shards=folder)
        self.images = images

    def step(self) -> None:
        """One epoch."""
        shards = open_shards(self.config.shards, self.config, SilentReporter())
        reader = ShardReader(shards)
        for number, index in enumerate(shards.indexes):
            for sample in range(index.num_samples):
                reader.read_all(number, [*itertools.chain.from_iterable(index.sample(sample).values())])
        reader.close()

    def facts(self) -> dict[str, Any]:
        """Samples an epoch."""
        return {"units": self.images}


class OurIndexer:
    """Builds the index of every shard from its headers; a step is several passes over all shards."""

    def __init__(self, shards: list[str], images: int) -> None:
        self.shards = [Path(shard) for shard in shards]
        self.images = images

    def step(self) -> None:
        """The passes."""
        for _ in range(_PASSES):
            for shard in self.shards:
                index_tar(shard)

    def facts(self) -> dict[str, Any]:
        """Samples indexed."""
        return {"units": self.images * _PASSES}


class FirstBatch:
    """The start of a resumed run until its first batch, at the beginning of an epoch and with a cached index."""

    def __init__(self, folder: str, images: int, epoch: int) -> None:
        self.config = DataConfig(shards=folder, image_size=64)
        self.first = epoch * images // _BATCH_SIZE

    def step(self) -> None:
        """Open the shards and make one batch."""
        shards = open_shards(self.config.shards, self.config, SilentReporter())
        loader = Loader(shards, self.config, seed=0, batch_size=_BATCH_SIZE)
        with closing(loader.batches(self.first, self.first + 1)) as batches:
            next(batches)

    def facts(self) -> dict[str, Any]:
        """Images of a batch."""
        return {"units": _BATCH_SIZE}


def measure(images: int, rounds: int, compared: bool) -> list[dict[str, Any]]:
    """One row per work and contender."""
    images = max(_BATCH_SIZE, images // _BATCH_SIZE * _BATCH_SIZE)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(_write(Path(scratch), images))
        shards = [str(path) for path in sorted(Path(folder).glob("*.tar"))]
        works: dict[str, list[Contender]] = {}
        for size in (64, 224):
            works[f"256 px JPEG to {size} px, {_WORKERS} workers"] = [
                Contender("ldm", OurLoader, (folder, size, images)),
                Contender("webdataset", peers.TheirLoader, (shards, size, _BATCH_SIZE, images, _WORKERS)),
            ]
        works[_READING] = [
            Contender("ldm", OurReader, (folder, images)),
            Contender("webdataset", peers.TheirReader, (shards, images)),
        ]
        if not compared:
            works = {work: field[:1] for work, field in works.items()}
        works[_INDEXING] = [Contender("ldm", OurIndexer, (shards, images))]
        works["first batch after a start"] = [
            Contender("ldm", FirstBatch, (folder, images, 0)),
            Contender("ldm at epoch 100", FirstBatch, (folder, images, 100)),
        ]
        for work, field in works.items():
            laps = race(field, rounds=rounds, warmup=1, one_processor=work in _OF_ONE_THREAD)
            for name, lap in laps.items():
                rate = lap.facts["units"] / median(lap.seconds)
                rows.append({"work": work, "contender": name, "per_second": rate, "speedup": speedup(laps["ldm"], lap)})
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
