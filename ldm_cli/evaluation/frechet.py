"""The Fréchet distance between two sets of features, each taken for a Gaussian.

Source: Dowson & Landau 1982, doi:10.1016/0047-259X(82)90077-X; on image features: Heusel et al. 2017,
arXiv:1706.08500, eq. 6. It depends on the feature network and on the number of samples: name and record both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import chain

import torch
from torch import Tensor

from ldm_cli.evaluation.intervals import NUM_GROUPS, interval, jackknife

_CHUNK = 2048


@dataclass(frozen=True)
class Gaussian:
    """Mean float64 [D] and unbiased covariance float64 [D, D] of feature vectors."""

    mean: Tensor
    covariance: Tensor

    @cached_property
    def root(self) -> Tensor:
        """R [D, rank] with R Rᵀ = covariance.

        Eigenvalues within rounding of 0 are left out: their roots would be as large as √ε.
        """
        values, vectors = torch.linalg.eigh(self.covariance)
        is_real = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
        root: Tensor = vectors[:, is_real] * values[is_real].sqrt()
        return root


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁^½ Σ₂ Σ₁^½)^½), at least 0.

    The last trace is the nuclear norm of R₁ᵀ R₂ for any R with R Rᵀ = Σ: singular values need no square root of a
    nearly singular matrix, and cannot turn complex.

    Raises:
        ValueError: if the numbers of features differ.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"frechet_distance: {len(first.mean)} features against {len(second.mean)}")
    cross = torch.linalg.svdvals(first.root.T @ second.root).sum()
    return max(0.0, _squared_shift(first, second) - 2 * float(cross))


def _squared_shift(first: Gaussian, second: Gaussian) -> float:
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂)."""
    traces = first.covariance.trace() + second.covariance.trace()
    return float((first.mean - second.mean).square().sum() + traces)


@dataclass(frozen=True)
class Moments:
    """Number, mean [D] and scatter Σ (x − μ)(x − μ)ᵀ [D, D] of feature vectors, float64 on any device."""

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Those of features [N, D], N at least 1."""
        features = features.double()
        mean = features.mean(0)
        return cls(len(features), mean, (features - mean).T @ (features - mean))

    def __add__(self, other: Moments) -> Moments:
        """Those of both sets together (Chan, Golub, LeVeque 1983, doi:10.1080/00031305.1983.10483115, eq. 2.1)."""
        count, step = self.count + other.count, other.mean - self.mean
        scatter = (self.scatter + other.scatter).addr_(step, step, alpha=self.count * other.count / count)
        return Moments(count, self.mean + step * (other.count / count), scatter)

    def __sub__(self, part: Moments) -> Moments:
        """Those of the rest, where `part` are those of a true subset."""
        count = self.count - part.count
        mean = self.mean + (self.mean - part.mean) * (part.count / count)
        step = mean - part.mean
        scatter = (self.scatter - part.scatter).addr_(step, step, alpha=-part.count * count / self.count)
        return Moments(count, mean, scatter)

    @property
    def gaussian(self) -> Gaussian:
        """The Gaussian of the vectors, with the unbiased covariance.

        Raises:
            ValueError: there are fewer than two.
        """
        if self.count < 2:
            raise ValueError(f"{self.count} feature vectors have no covariance; at least 2 are needed")
        return Gaussian(self.mean, self.scatter / (self.count - 1))


class FeatureMoments:
    """Moments of feature vectors that arrive in batches; vector i counts in group i mod `NUM_GROUPS`.

    The memory is that of `NUM_GROUPS` covariances, for any number of vectors.
    """

    def __init__(self) -> None:
        self.count = 0
        self._groups: list[Moments | None] = [None] * NUM_GROUPS
        self._waiting: list[Tensor] = []

    def add(self, features: Tensor) -> None:
        """Count further vectors [B, D]."""
        self._waiting.append(features)
        self.count += len(features)
        if sum(map(len, self._waiting)) >= _CHUNK:
            self._merge()

    @property
    def width(self) -> int:
        """Number of features of a vector, of which there is at least one."""
        return len(self.whole.mean)

    def _merge(self) -> None:
        """Bring the waiting vectors into their groups; of many at once this costs little beside their features."""
        if not self._waiting:
            return
        features, self._waiting = torch.cat(self._waiting), []
        start = self.count - len(features)
        for number, before in enumerate(self._groups):
            if len(own := features[(number - start) % NUM_GROUPS :: NUM_GROUPS]):
                self._groups[number] = Moments.of(own) if before is None else before + Moments.of(own)

    def gaussians_without_a_group(self) -> Iterator[Gaussian]:
        """For each group, the Gaussian of the vectors of all others; of 20 vectors or more."""
        whole = self.whole
        return ((whole - group).gaussian for group in self._groups if group is not None)

    @property
    def whole(self) -> Moments:
        """Those of all vectors, at least one."""
        self._merge()
        return reduce(Moments.__add__, (group for group in self._groups if group is not None))


def frechet_estimates(
    generated: FeatureMoments | Gaussian, real: FeatureMoments | Gaussian, name: str = "fid"
) -> dict[str, object]:
    """The Fréchet distance, with its sampling error and its limit of many pictures.

    The distance of N pictures is too large by about a constant / N (Chong & Forsyth 2020, arXiv:1911.07023, section 3).
    A jackknife that leaves out a tenth of the pictures measures this and the standard error.

    Args:
        generated, real: of two vectors or more. A Gaussian is taken as exact.
        name: of the distance: `fid`, or that of `frechet_name`.

    Returns:
        With `fid` for the name: `fid`; `fid_interval`, 95 % for the distance at these numbers of pictures;
        `fid_infinity` and `fid_infinity_interval`, for endless numbers of pictures. The last three are None where a set
        has fewer than 20 pictures, or both are Gaussians.
    """
    whole = [one if isinstance(one, Gaussian) else one.whole.gaussian for one in (generated, real)]
    distance = frechet_distance(*whole)
    found: dict[str, object] = dict.fromkeys(
        (name, f"{name}_interval", f"{name}_infinity", f"{name}_infinity_interval")
    )
    found[name] = distance
    sampled = [
        (one, whole[n], whole[1 - n]) for n, one in enumerate((generated, real)) if not isinstance(one, Gaussian)
    ]
    if not sampled or min(moments.count for moments, _, _ in sampled) < 2 * NUM_GROUPS:
        return found
    differences = []
    for moments, own, other in sampled:
        first, *rest = _distances(other, chain((own,), moments.gaussians_without_a_group()))
        differences.append([distance - first for distance in rest])
    bias, error = jackknife(differences)
    return found | {
        f"{name}_interval": interval(distance, error),
        f"{name}_infinity": distance - bias,
        f"{name}_infinity_interval": interval(distance - bias, error),
    }


def _distances(fixed: Gaussian, others: Iterable[Gaussian]) -> list[float]:
    """Distances of several Gaussians to one, whose root alone is taken."""
    found = []
    for other in others:
        roots = torch.linalg.eigvalsh(fixed.root.T @ other.covariance @ fixed.root).clamp(min=0).sqrt()
        found.append(_squared_shift(fixed, other) - 2 * float(roots.sum()))
    return found


def frechet_name(weights_sha256: str) -> str:
    """Name of the distance with a hash of the feature network: `fd[1a2b3c4d]`.

    Only the features of one specific Inception network give the number known as FID.
    """
    return f"fd[{weights_sha256[:8]}]"
