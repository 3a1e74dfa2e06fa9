"""The metrics of two sets of pictures: what they need of each set, and all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from ldm_cli.core.models.inception import Tap
from ldm_cli.errors import DataError
from ldm_cli.evaluation.config import MetricName, PictureMetric
from ldm_cli.evaluation.frechet import FeatureMoments, Gaussian, frechet_estimates
from ldm_cli.evaluation.inception_score import NUM_SPLITS, inception_score
from ldm_cli.evaluation.kernel_distances import clip_maximum_mean_discrepancy, kernel_inception_distance
from ldm_cli.evaluation.manifolds import DENSITY_NEIGHBOR, precision_recall_density_coverage

CLIP = "clip"
"""Name of CLIP embeddings among the features of a set."""
DINOV2 = "dinov2"
"""Name of DINOv2 features."""

POOLED: Tap = "2048"
"""Name of the features that distances take."""
_LOGITS: Tap = "logits"
RECONSTRUCTED = "2048 of reconstructions"
"""Name of the same features of what an autoencoder makes of the pictures."""


def needed_taps(metrics: Collection[MetricName]) -> list[Tap]:
    """The Inception features that the metrics take."""
    pooled = [POOLED] if {"fid", "rfid", "kid", "prdc"} & set(metrics) else []
    return [*pooled, _LOGITS] if "is" in metrics else pooled


_FEWEST: dict[PictureMetric, int] = {
    "fid": 2,
    "fd_dinov2": 2,
    "kid": 2,
    "prdc": DENSITY_NEIGHBOR + 1,
    "is": NUM_SPLITS,
    "cmmd": 1,
}
_FRECHET: dict[PictureMetric, str] = {"fid": POOLED, "fd_dinov2": DINOV2}
_OF_PAIRS: dict[PictureMetric, tuple[Callable[[Tensor, Tensor], dict[str, object]], str]] = {
    "kid": (kernel_inception_distance, POOLED),
    "prdc": (precision_recall_density_coverage, POOLED),
    "cmmd": (clip_maximum_mean_discrepancy, CLIP),
}


_KEPT_FOR = {POOLED: {"kid", "prdc"}, _LOGITS: {"is"}, CLIP: {"cmmd"}}
_MOMENTS_FOR = {POOLED: {"fid", "rfid"}, RECONSTRUCTED: {"rfid"}, CLIP: {"frechet_distance"}, DINOV2: {"fd_dinov2"}}


class PictureFeatures:
    """The features of one set of pictures that the metrics need.

    For Fréchet distances this takes the same memory for any number of pictures. Of each picture, `kid` and `prdc`
    together keep 8 KiB, `is` 4 KiB, `cmmd` 2 to 4 KiB, in main memory.

    Args:
        device: where they are computed.

    Attributes:
        moments: by kind of features.
    """

    def __init__(self, metrics: Collection[MetricName], device: torch.device) -> None:
        self.count, self._device = 0, device
        self.moments = {name: FeatureMoments() for name, users in _MOMENTS_FOR.items() if users & set(metrics)}
        self._kept: dict[str, list[Tensor]] = {name: [] for name, users in _KEPT_FOR.items() if users & set(metrics)}

    def add(self, measured: Mapping[str, Tensor]) -> None:
        """Count further pictures by their features [B, N], by the names of this module; others are passed over."""
        for name, features in measured.items():
            if name in self.moments:
                self.moments[name].add(features.to(self._device))
            if name in self._kept:
                self._kept[name].append(features.cpu())
        self.count += len(next(iter(measured.values())))

    def kept(self, name: str) -> Tensor:
        """All features of one kind: float32 [N, D]."""
        return torch.cat(self._kept[name]).to(self._device)


def measure_pictures(
    metrics: Collection[PictureMetric],
    generated: PictureFeatures | Gaussian,
    real: PictureFeatures | Gaussian | None,
    warn: Callable[[str], None],
) -> dict[PictureMetric, dict[str, object]]:
    """The metrics by name, each as its function returns it.

    Args:
        generated: features of the pictures that are judged; a Gaussian for `fid` alone.
        real: those of the reference; a Gaussian for `fid` and `is`, None for `is`.
        warn: is called where a distance is of fewer pictures than features.

    Raises:
        DataError: a set is too small for a metric, or features are of different networks.
    """
    found: dict[PictureMetric, dict[str, object]] = {}
    for metric in metrics:
        for which, one in (("generated", generated), ("real", None if metric == "is" else real)):
            if isinstance(one, PictureFeatures):
                _expect_enough(one.count, which, _FEWEST[metric], metric)
        if metric in _FRECHET:
            found[metric] = frechet_of(_FRECHET[metric], metric, generated, real, warn)
            continue
        assert isinstance(generated, PictureFeatures)
        if metric == "is":
            found[metric] = inception_score(generated.kept(_LOGITS))
            continue
        assert isinstance(real, PictureFeatures)
        function, features = _OF_PAIRS[metric]
        found[metric] = function(generated.kept(features), real.kept(features))
    return found


def frechet_of(
    features: str,
    name: str,
    generated: PictureFeatures | Gaussian,
    real: PictureFeatures | Gaussian | None,
    warn: Callable[[str], None],
) -> dict[str, object]:
    """The Fréchet distance of one kind of features, as `frechet_estimates` returns it.

    Args:
        features: `2048`, `CLIP` or `DINOV2`.
        name: of the distance.
        generated, real, warn: as in `measure_pictures`.

    Raises:
        DataError: a set is too small.
    """
    sides = []
    for which, one in (("generated", generated), ("real", real)):
        assert one is not None
        moments = one.moments[features] if isinstance(one, PictureFeatures) else one
        if isinstance(moments, FeatureMoments):
            expect_enough_vectors(moments, which, name, warn)
        sides.append(moments)
    return frechet_estimates(sides[0], sides[1], name)


def expect_enough_vectors(moments: FeatureMoments, which: str, metric: str, warn: Callable[[str], None]) -> None:
    """Refuse one picture, which has no covariance, and warn where the covariance has not its full rank.

    Raises:
        DataError: naming the number of pictures.
    """
    _expect_enough(moments.count, which, _FEWEST["fid"], metric)
    if moments.count <= moments.width:
        warn(
            f"{metric}: {moments.count} {which} pictures for {moments.width} features; "
            "compare only with distances of as many pictures"
        )


def _expect_enough(count: int, which: str, fewest: int, metric: str) -> None:
    """Refuse fewer pictures than a metric needs.

    Raises:
        DataError: naming both numbers.
    """
    if count < fewest:
        cause = f"{count} {which} pictures, but at least {fewest} are needed"
        raise DataError(f"{metric} cannot be measured", cause)
