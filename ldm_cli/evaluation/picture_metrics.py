"""The metrics of two sets of pictures: what they need of each set, and all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from ldm_cli.core.models.inception import Tap
from ldm_cli.errors import DataError
from ldm_cli.evaluation.config import PictureMetric
from ldm_cli.evaluation.frechet import FeatureMoments, Gaussian, frechet_inception_distance
from ldm_cli.evaluation.inception_score import NUM_SPLITS, inception_score
from ldm_cli.evaluation.kernel_distances import clip_maximum_mean_discrepancy, kernel_inception_distance
from ldm_cli.evaluation.manifolds import DENSITY_NEIGHBOR, precision_recall_density_coverage

CLIP = "clip"
"""Name of CLIP embeddings among the features of a set."""

_POOLED: Tap = "2048"
_LOGITS: Tap = "logits"


def needed_taps(metrics: Collection[PictureMetric]) -> list[Tap]:
    """The Inception features that the metrics take."""
    pooled = [_POOLED] if {"fid", "kid", "prdc"} & set(metrics) else []
    return [*pooled, _LOGITS] if "is" in metrics else pooled


_FEWEST: dict[PictureMetric, int] = {"fid": 2, "kid": 2, "prdc": DENSITY_NEIGHBOR + 1, "is": NUM_SPLITS, "cmmd": 1}
_OF_PAIRS: dict[PictureMetric, tuple[Callable[[Tensor, Tensor], dict[str, object]], str]] = {
    "kid": (kernel_inception_distance, _POOLED),
    "prdc": (precision_recall_density_coverage, _POOLED),
    "cmmd": (clip_maximum_mean_discrepancy, CLIP),
}


class PictureFeatures:
    """The features of one set of pictures that the metrics need.

    For `fid` alone this takes the same memory for any number of pictures; the others keep 3 to 8 KiB of each.

    Args:
        metrics: which.
        device: where they are computed.

    Attributes:
        count: number of pictures.
        moments: of the features that the distances take.
    """

    def __init__(self, metrics: Collection[PictureMetric], device: torch.device) -> None:
        self.count, self.moments = 0, FeatureMoments()
        self._device, self._has_fid = device, "fid" in metrics
        kept = [_POOLED] if {"kid", "prdc"} & set(metrics) else []
        self._kept: dict[str, list[Tensor]] = {name: [] for name in (*kept, _LOGITS, CLIP)}

    def add(self, features: Mapping[str, Tensor]) -> None:
        """Count further pictures by their features [B, N], of `needed_taps` and `CLIP`."""
        for name, values in features.items():
            if name == _POOLED and self._has_fid:
                self.moments.add(values.to(self._device))
            if name in self._kept:
                self._kept[name].append(values.cpu())
        self.count += len(next(iter(features.values())))

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
        metrics: which.
        generated: features of the pictures that are judged; a Gaussian for `fid` alone.
        real: those of the reference; a Gaussian for `fid` and `is`, None for `is`.
        warn: is called where a distance is of fewer pictures than features.

    Raises:
        DataError: a set is too small for a metric, or features are of different networks.
    """
    found: dict[PictureMetric, dict[str, object]] = {}
    for metric in metrics:
        for which, one in (("generated", generated), ("real", None if metric == "is" else real)):
            if isinstance(one, PictureFeatures) and one.count < _FEWEST[metric]:
                cause = f"{one.count} {which} pictures, but at least {_FEWEST[metric]} are needed"
                raise DataError(f"{metric} cannot be measured", cause)
        if metric == "fid":
            found[metric] = _distance(generated, real, warn)
            continue
        assert isinstance(generated, PictureFeatures)
        if metric == "is":
            found[metric] = inception_score(generated.kept(_LOGITS))
            continue
        assert isinstance(real, PictureFeatures)
        function, features = _OF_PAIRS[metric]
        found[metric] = function(generated.kept(features), real.kept(features))
    return found


def _distance(
    generated: PictureFeatures | Gaussian, real: PictureFeatures | Gaussian | None, warn: Callable[[str], None]
) -> dict[str, object]:
    sides = []
    for which, one in (("generated", generated), ("real", real)):
        assert one is not None
        if isinstance(one, PictureFeatures) and one.count <= int(_POOLED):
            warn(
                f"fid: {one.count} {which} pictures for {_POOLED} features; compare only with distances of as many "
                "pictures"
            )
        sides.append(one.moments if isinstance(one, PictureFeatures) else one)
    return frechet_inception_distance(*sides)
