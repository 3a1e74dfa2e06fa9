"""The Fréchet distance between two sets of features, each taken for a Gaussian.

Source: Dowson & Landau 1982, doi:10.1016/0047-259X(82)90077-X; on image features: Heusel et al. 2017,
arXiv:1706.08500, eq. 6. It depends on the feature network and on the number of samples: name and record both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    """Mean float64 [D] and unbiased covariance float64 [D, D] of feature vectors."""

    mean: Tensor
    covariance: Tensor


def fit_gaussian(features: Tensor) -> Gaussian:
    """The Gaussian of features [N, D], in float64 on the CPU.

    Raises:
        ValueError: a feature is not finite, or there are fewer than two.
    """
    features = features.detach().to(device="cpu", dtype=torch.float64)
    if not bool(torch.isfinite(features).all()):
        raise ValueError("fit_gaussian: a feature is not finite")
    if len(features) < 2:
        raise ValueError(f"fit_gaussian: {len(features)} features have no covariance; at least 2 are needed")
    return Gaussian(features.mean(0), torch.cov(features.T).reshape(features.shape[1], -1))


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁^½ Σ₂ Σ₁^½)^½), at least 0.

    The last trace is the nuclear norm of Σ₁^½ Σ₂^½, since (Σ₁^½ Σ₂^½)(Σ₁^½ Σ₂^½)ᵀ is the product under the
    root; singular values need no square root of a nearly singular matrix, and cannot turn complex.

    Raises:
        ValueError: if the numbers of features differ.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"frechet_distance: {len(first.mean)} features against {len(second.mean)}")
    cross = torch.linalg.svdvals(_square_root(first.covariance) @ _square_root(second.covariance)).sum()
    traces = first.covariance.trace() + second.covariance.trace()
    return max(0.0, float((first.mean - second.mean).square().sum() + traces - 2 * cross))


def frechet_name(weights_sha256: str) -> str:
    """Name of the distance with a hash of the feature network: `fd[1a2b3c4d]`.

    Only the features of one specific Inception network give the number known as FID.
    """
    return f"fd[{weights_sha256[:8]}]"


def _square_root(covariance: Tensor) -> Tensor:
    """The symmetric root of a positive semi-definite matrix; negative eigenvalues come from rounding and count as 0."""
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root
