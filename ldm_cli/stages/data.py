"""`ldm data`: make shards (`synth`, `pack`) and examine them (`check`, `stats`, `index`).

Each function returns JSON-able data for the command line to show.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ldm_cli.data import pack as packing
from ldm_cli.data import report, scenes
from ldm_cli.data.config import DataConfig
from ldm_cli.data.duplicates import find_duplicates
from ldm_cli.data.open_shards import NoSamplesError, make_tables, open_shards
from ldm_cli.errors import DataError
from ldm_cli.reporting import Reporter
from ldm_cli.training.distributed import SECONDS_OF_SILENCE, joined

synth = scenes.write_scenes
"""Write synthetic scenes with captions and ground truth as shards."""
pack = packing.pack
"""Make shards of a folder of pictures, or of a table that names some."""


def check(config: DataConfig, reporter: Reporter) -> dict[str, Any]:
    """Decode every sample of `config.shards`; damage is reported in the result, where `ok` sums it up.

    Raises:
        DataError: there is no whole sample.
    """
    tolerant = config.model_copy(update={"on_bad_shard": "skip"})
    try:
        shards = open_shards(config.shards, tolerant, reporter)
    except NoSamplesError as error:
        raise DataError(error.what, error.cause, "make or fetch the shards again") from error
    return report.check(shards, config, reporter)


def stats(config: DataConfig, reporter: Reporter) -> dict[str, Any]:
    """Count and measure the content of `config.shards`: `report.stats`."""
    return report.stats(open_shards(config.shards, config, reporter), config, reporter)


def duplicates(
    config: DataConfig, file: Path, against: str | None, threshold: float, reporter: Reporter
) -> dict[str, Any]:
    """Near-duplicates within `config.shards`, and samples shared with the shards `against`: `find_duplicates`."""
    tolerant = config.model_copy(update={"on_bad_shard": "skip"})
    return find_duplicates(tolerant, file, against, threshold, reporter)


def index(
    config: DataConfig, reporter: Reporter, sizes_file: Path | None = None, hashed: bool = False
) -> dict[str, Any]:
    """Index `config.shards` and keep the tables for later runs; several ranks share the work.

    Returns:
        That of `report.index`; nothing on all ranks but the first.
    """
    with joined(torch.device("cpu"), SECONDS_OF_SILENCE) as ranks:
        if ranks.world_size > 1:
            make_tables(config, reporter, hashed, ranks.rank, ranks.world_size)
            ranks.wait()
        if not ranks.is_first:
            return {}
        return report.index(open_shards(config.shards, config, reporter, hashed, needs_tables=True), sizes_file)
