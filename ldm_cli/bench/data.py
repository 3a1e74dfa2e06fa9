"""Speed of the input pipeline: 256 px JPEGs to batches of 64 and 224 px, and reading alone."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

from ldm_cli.bench import peers
from ldm_cli.bench.race import Contender, Turns, race, speed
from ldm_cli.bench.stand_ins import write_pictures
from ldm_cli.data.config import DataConfig
from ldm_cli.data.loader import Loader
from ldm_cli.data.open_shards import open_shards
from ldm_cli.data.shards import ShardReader
from ldm_cli.reporting import SilentReporter

_BATCH_SIZE, _WORKERS = 64, 2
_READING = "reading alone"


def load(turns: Turns, folder: str, size: int, images: int) -> None:
    """Our loader with two workers; a turn is an epoch."""
    config = DataConfig(shards=folder, image_size=size, num_workers=_WORKERS)
    loader = Loader(open_shards(folder, config, SilentReporter()), config, seed=0, batch_size=_BATCH_SIZE)

    def epoch() -> None:
        for _ in loader.batches(0, images // _BATCH_SIZE):
            pass

    turns.repeat(images, epoch)


def read(turns: Turns, folder: str, images: int) -> None:
    """Reads every member of every sample through the index; a turn opens the shards and reads an epoch."""
    config = DataConfig(shards=folder)

    def epoch() -> None:
        shards = open_shards(folder, config, SilentReporter())
        reader = ShardReader(shards)
        for number, index in enumerate(shards.indexes):
            for sample in range(index.num_samples):
                reader.read_all(number, [*itertools.chain.from_iterable(index.sample(sample).values())])
        reader.close()

    turns.repeat(images, epoch)


def measure(images: int, rounds: int, compared: bool) -> list[dict[str, Any]]:
    """One row per work and contender."""
    images = max(_BATCH_SIZE, images // _BATCH_SIZE * _BATCH_SIZE)
    with tempfile.TemporaryDirectory() as scratch:
        folder = f"{scratch}/shards"
        shards = write_pictures(Path(folder), images, 256)
        works = {
            f"256 px JPEG to {size} px, {_WORKERS} workers": [
                Contender("ldm", load, (folder, size, images)),
                Contender("webdataset", peers.load, (shards, size, _BATCH_SIZE, images, _WORKERS)),
            ]
            for size in (64, 224)
        }
        works[_READING] = [
            Contender("ldm", read, (folder, images)),
            Contender("webdataset", peers.read, (shards, images)),
        ]
        rows = []
        for work, field in works.items():
            laps = race(field if compared else field[:1], rounds=rounds, one_processor=work == _READING)
            rows += [{"work": work} | speed(name, each, laps["ldm"]) for name, each in laps.items()]
    return rows
