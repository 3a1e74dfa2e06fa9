"""Statistics of a set of pictures as pytorch-fid and clean-fid keep them: mean and covariance of Inception features."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_cli.core.models.inception import NUM_FEATURES
from ldm_cli.errors import DataError
from ldm_cli.evaluation.frechet import Gaussian
from ldm_cli.formats.npz import read_npz, write_npz


@dataclass(frozen=True)
class Statistics:
    """A file of statistics.

    Attributes:
        gaussian: mean and covariance.
        count: number of pictures; None where the file does not say.
        provenance: of the features, as `write_statistics` got it; empty in files of other programs.
    """

    gaussian: Gaussian
    count: int | None
    provenance: dict[str, Any]


def read_statistics(file: Path) -> Statistics:
    """Read `mu` and `sigma` of a `.npz` file.

    Raises:
        DataError: it has none, of another size, or not finite.
        OSError: it cannot be read.
    """
    arrays = read_npz(file)
    mean, covariance, count = arrays.get("mu"), arrays.get("sigma"), arrays.get("n")
    if not isinstance(mean, Tensor) or not isinstance(covariance, Tensor):
        raise DataError(f"cannot use '{file}'", "it lacks mu or sigma", "give statistics of pytorch-fid or clean-fid")
    width = NUM_FEATURES["2048"]
    if mean.shape != (width,) or covariance.shape != (width, width):
        found = f"mu is {list(mean.shape)}, sigma {list(covariance.shape)}"
        raise DataError(f"cannot use '{file}'", f"{found}, but FID takes {width} features")
    if not bool(torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
        raise DataError(f"cannot use '{file}'", "its statistics are not finite")
    try:
        provenance = json.loads(str(arrays.get("provenance", "{}")))
    except ValueError as error:
        raise DataError(f"cannot use '{file}'", f"its provenance is no JSON: {error}") from error
    number = int(count) if isinstance(count, Tensor) and count.numel() == 1 else None
    return Statistics(Gaussian(mean.double(), covariance.double()), number, provenance)


def write_statistics(file: Path, gaussian: Gaussian, count: int, provenance: Mapping[str, Any]) -> None:
    """Write `mu`, `sigma`, `n` and `provenance`; other programs read the first two. Errors as in `whole_file`."""
    arrays = {"mu": gaussian.mean, "sigma": gaussian.covariance, "n": torch.tensor(count)}
    write_npz(file, {**arrays, "provenance": json.dumps(provenance, ensure_ascii=False)})
