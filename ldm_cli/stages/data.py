"""`ldm data`: make shards (`synth`, `pack`) and look into them (`check`, `stats`, `index`).

Each function returns JSON-able data for the command line to show.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm_cli.data import pack as packing
from ldm_cli.data import report, scenes
from ldm_cli.data.config import DataConfig
from ldm_cli.data.open_shards import open_shards
from ldm_cli.data.sources import Choices
from ldm_cli.reporting import Reporter


def synth(
    out: Path,
    samples: int,
    size: int,
    seed: int,
    reporter: Reporter,
    *,
    val_samples: int | None = None,
    two_object_fraction: float = scenes.TWO_OBJECT_FRACTION,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Draw scenes with captions and ground truth into `out`: `scenes.write_scenes`."""
    return scenes.write_scenes(
        out,
        samples,
        size,
        seed,
        reporter,
        val_samples=val_samples,
        two_object_fraction=two_object_fraction,
        overwrite=overwrite,
    )


def pack(
    source: Path,
    out: Path,
    reporter: Reporter,
    *,
    choices: Choices = Choices(),
    shard_samples: int = 10_000,
    prefix: str = "train-",
) -> dict[str, Any]:
    """Make shards of a folder of pictures, or of a table that names some: `data.pack.pack`."""
    return packing.pack(source, out, reporter, choices=choices, shard_samples=shard_samples, prefix=prefix)


def check(config: DataConfig, reporter: Reporter) -> dict[str, Any]:
    """Decode every sample of `config.shards`; damage is reported in the result, where `ok` sums it up."""
    tolerant = config.model_copy(update={"on_bad_shard": "skip"})
    return report.check(open_shards(config.shards, tolerant, reporter), config, reporter)


def stats(config: DataConfig, reporter: Reporter) -> dict[str, Any]:
    """Count and measure what is in `config.shards`: `report.stats`."""
    return report.stats(open_shards(config.shards, config, reporter), config, reporter)


def index(config: DataConfig, reporter: Reporter, sizes_file: Path | None = None) -> dict[str, Any]:
    """Index `config.shards` and keep the indexes for later runs: `report.index`."""
    return report.index(open_shards(config.shards, config, reporter), sizes_file)
