"""`ldm compare`: distances of two sets of pictures, and scores of one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_cli.errors import DataError, OutputError, UsageError
from ldm_cli.evaluation.clip_features import CLIPFeatures
from ldm_cli.evaluation.config import HOW_TO_GET_INCEPTION, PictureMetric, Preprocessing
from ldm_cli.evaluation.dinov2_features import DINOv2Features
from ldm_cli.evaluation.frechet import Gaussian
from ldm_cli.evaluation.inception_features import InceptionFeatures
from ldm_cli.evaluation.picture_metrics import CLIP, DINOV2, POOLED, PictureFeatures, measure_pictures, needed_taps
from ldm_cli.evaluation.statistics_files import Statistics, read_statistics, write_statistics
from ldm_cli.families.open_family import resolve_model
from ldm_cli.formats.model_source import weights_sha256
from ldm_cli.reporting import Reporter
from ldm_cli.stages.support.options import resolve_device
from ldm_cli.stages.support.picture_sets import PictureSet, open_pictures
from ldm_cli.stages.support.rounds import Measured, measured_in_rounds
from ldm_cli.training.distributed import SECONDS_OF_SILENCE, joined, local_rank
from ldm_cli.training.ranks import Ranks
from ldm_cli.training.run_folder import environment

STATISTICS_SUFFIX = ".npz"
_HASHES = "sha256"
_BATCHES_PER_ROUND = 8


@dataclass(frozen=True)
class CompareOptions:
    """What to measure, and with which networks."""

    metrics: tuple[PictureMetric, ...] = ("fid",)
    """In the order of the result."""
    inception: Path | None = None
    """Weights of FID's Inception network."""
    clip: Path | None = None
    """CLIPModel folder, for `cmmd`."""
    dinov2: Path | None = None
    """Dinov2Model folder, for `fd_dinov2`."""
    preprocessing: Preprocessing = "torch-fidelity"
    """Program whose preparation of pictures for the Inception network is taken."""
    batch_size: int = 50
    """Pictures per call of a network."""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`."""
    save_statistics: Path | None = None
    """File for the statistics of the reference; None: they are not kept."""
    overwrite: bool = False
    """Replace that file."""


@dataclass(frozen=True)
class _Measured:
    """One of the sets: its features or statistics, and where they come from."""

    features: PictureFeatures | Gaussian
    about: dict[str, Any]
    """`source` and `num_pictures`; where they are known, `sha256` of the pictures, `inception` (network, preparation),
    `job` (of pictures of `ldm sample`)."""


def run(generated: str, real: str | None, options: CompareOptions, reporter: Reporter) -> dict[str, Any]:
    """Compare a set of pictures with a reference.

    Args:
        generated: the pictures that are judged: a folder, shards, or a `.npz` file of statistics.
        real: the same of the reference; None: there is none, which serves `is` and `save_statistics`.

    Returns:
        The numbers of all metrics by their names, and `provenance`. Empty on all ranks but the first.

    Raises:
        UsageError: an option is missing or does not fit the sets.
        InputNotFoundError, DataError: a set is missing, damaged, too small, or measured in another way.
        CheckpointError: a network cannot be used.
        OutputError, StorageError: the statistics cannot be written.
    """
    names = [generated] if real is None else [generated, real]
    _check(names, options)
    device = resolve_device(options.device, local_rank())
    with joined(device, SECONDS_OF_SILENCE) as ranks:
        with ranks.first_then_others():
            sets = [read_statistics(Path(name)) if _is_file(name) else open_pictures(name, reporter) for name in names]
        networks = _Networks(options, device, is_used=any(isinstance(one, PictureSet) for one in sets))
        measured = [
            _of_file(name, one, device)
            if isinstance(one, Statistics)
            else _of_pictures(one, options, networks, reporter, ranks)
            for name, one in zip(names, sets, strict=True)
        ]
        _check_comparable(measured, reporter)
        if not ranks.is_first:
            return {}
        result = _result(measured, options, networks, reporter)
        if options.save_statistics is not None:
            _save(options.save_statistics, measured[-1])
            reporter.info(f"statistics of '{names[-1]}' are in {options.save_statistics}")
    return result


def _result(
    measured: list[_Measured], options: CompareOptions, networks: _Networks, reporter: Reporter
) -> dict[str, Any]:
    reference = measured[1].features if len(measured) == 2 else None
    metrics = options.metrics if reference is not None else tuple(m for m in options.metrics if m == "is")
    found = measure_pictures(metrics, measured[0].features, reference, reporter.warn)
    device = networks.device
    return {
        **{name: value for values in found.values() for name, value in values.items()},
        "provenance": {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": environment(device),
            "device": str(device),
            "networks": networks.provenance,
            **{which: one.about for which, one in zip(("generated", "real"), measured, strict=False)},
        },
    }


def _is_file(name: str) -> bool:
    return name.endswith(STATISTICS_SUFFIX)


def _check(names: list[str], options: CompareOptions) -> None:
    """Refuse what cannot be measured before anything is read."""
    target, files = options.save_statistics, [name for name in names if _is_file(name)]
    if len(names) == 1 and (wrong := [m for m in options.metrics if m != "is"]) and target is None:
        raise UsageError(f"{', '.join(wrong)} compares two sets", f"only '{names[0]}' is given", "name a second one")
    others = [metric for metric in options.metrics if metric != "fid"]
    if files and others and (files != names[1:] or others != ["is"]):
        raise UsageError(f"{', '.join(others)} cannot be measured", f"'{files[0]}' is statistics, which serve fid")
    if len(files) < len(names) and needed_taps(options.metrics) and options.inception is None:
        raise UsageError(
            f"{', '.join(m for m in options.metrics if m not in ('cmmd', 'fd_dinov2'))} needs --inception FILE",
            "the weights of FID's network are not part of this program",
            f"{HOW_TO_GET_INCEPTION}; cmmd takes a CLIP, and fd_dinov2 a DINOv2 instead",
        )
    if "cmmd" in options.metrics and options.clip is None:
        raise UsageError("cmmd needs --clip DIR", remedy="give a CLIPModel folder: published numbers take ViT-L/14-336")
    if "fd_dinov2" in options.metrics and options.dinov2 is None:
        raise UsageError("fd_dinov2 needs --dinov2 DIR", remedy="give a Dinov2Model folder, as facebook/dinov2-large")
    if target is None:
        return
    if target.suffix != STATISTICS_SUFFIX or "fid" not in options.metrics or _is_file(names[-1]):
        cause = "a .npz file of the reference's pictures, with fid among the metrics, is what can be saved"
        raise UsageError(f"cannot save statistics as '{target}'", cause)
    if target.exists() and not options.overwrite:
        raise OutputError(f"'{target}' exists already", remedy="choose another name, or pass --overwrite")


class _Networks:
    """The networks that the metrics need."""

    def __init__(self, options: CompareOptions, device: torch.device, is_used: bool) -> None:
        self.device, self.provenance = device, dict[str, Any]()
        self.taps = needed_taps(options.metrics) if is_used else []
        self.inception = self.clip = self.dinov2 = None
        if self.taps and options.inception is not None:
            self.inception = InceptionFeatures.load(options.inception, device, options.preprocessing)
            self.provenance["inception"] = self.inception.provenance
        if "cmmd" in options.metrics and options.clip is not None:
            folder = resolve_model(options.clip)
            self.clip = CLIPFeatures.load(folder, device)
            self.provenance[CLIP] = {"folder": str(folder), "sha256": weights_sha256(folder)}
        if "fd_dinov2" in options.metrics and options.dinov2 is not None:
            self.dinov2 = DINOv2Features(resolve_model(options.dinov2), device)
            self.provenance[DINOV2] = self.dinov2.provenance

    def __call__(self, pictures: list[Tensor]) -> Measured:
        """Features of pictures uint8 [3, H, W], by name."""
        found: Measured = {}
        if self.inception is not None:
            found |= {name: features.cpu() for name, features in self.inception(pictures, self.taps).items()}
        if self.clip is not None:
            found[CLIP] = self.clip.squares(pictures)
        if self.dinov2 is not None:
            found[DINOV2] = self.dinov2(pictures).cpu()
        return found


def _of_pictures(
    pictures: PictureSet, options: CompareOptions, networks: _Networks, reporter: Reporter, ranks: Ranks
) -> _Measured:
    features, digest = PictureFeatures(options.metrics, networks.device), hashlib.sha256()
    own = pictures.batches(options.batch_size, ranks.rank, ranks.world_size)
    numbers = range(-(-len(pictures.files) // options.batch_size))
    with (
        closing(own),
        reporter.progress(f"measuring {Path(pictures.name).name}", len(pictures.files), unit="picture") as progress,
    ):

        def measure(numbers: list[int]) -> Iterator[Measured]:
            return (networks(batch) | {_HASHES: hashes} for batch, hashes in islice(own, len(numbers)))

        for found in measured_in_rounds(numbers, measure, ranks, _BATCHES_PER_ROUND):
            digest.update(bytes(found.pop(_HASHES).flatten().tolist()))
            features.add(found)
            progress.update(features.count)
    about = {"source": pictures.name, "num_pictures": features.count, "sha256": digest.hexdigest()}
    inception = {"inception": networks.inception.provenance} if networks.inception else {}
    return _Measured(features, {**about, **inception, **({"job": pictures.job} if pictures.job else {})})


def _of_file(name: str, statistics: Statistics, device: torch.device) -> _Measured:
    gaussian = Gaussian(statistics.gaussian.mean.to(device), statistics.gaussian.covariance.to(device))
    return _Measured(gaussian, {**statistics.provenance, "source": name, "num_pictures": statistics.count})


def _check_comparable(measured: list[_Measured], reporter: Reporter) -> None:
    """Refuse features of two kinds; warn where a file does not say of which kind it is."""
    known = [one.about for one in measured if "inception" in one.about]
    for name, what in (("preprocessing", "preprocessing"), ("sha256", "weights of the Inception network")):
        if len(found := {about["inception"][name]: about["source"] for about in known}) > 1:
            raise DataError(
                f"{' and '.join(map(repr, found.values()))} cannot be compared",
                f"their {what} differ: {' and '.join(found)}",
                "measure both in the same way",
            )
    for one in measured:
        if isinstance(one.features, Gaussian) and one.about not in known:
            reporter.warn(f"'{one.about['source']}' does not say with which preprocessing it was measured")


def _save(file: Path, measured: _Measured) -> None:
    features = measured.features
    assert isinstance(features, PictureFeatures)
    write_statistics(file, features.moments[POOLED].whole.gaussian, features.count, measured.about)
