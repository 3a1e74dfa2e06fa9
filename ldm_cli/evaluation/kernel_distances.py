"""Maximum mean discrepancies of two sets of features: KID and CMMD (Gretton et al. 2012, JMLR 13:723)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_cli.evaluation.intervals import interval
from ldm_cli.evaluation.subsets import Permutations

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
"""As published; of fewer pictures, all are taken."""

_CMMD_VARIANCE = 100.0
_CMMD_SCALE = 1000.0
_CHUNK = 2048


def kernel_inception_distance(generated: Tensor, real: Tensor, subset_size: int = KID_SUBSET_SIZE) -> dict[str, object]:
    """The unbiased squared discrepancy with the kernel (x·y / D + 1)³, averaged over 100 random pairs of subsets.

    Source: Bińkowski et al. 2018, arXiv:1801.01401, section 4. It may be negative. The subsets are those of
    torch-fidelity. The standard error is that of subsampling (Politis, Romano, Wolf 1999, section 2.2): the variance of
    a subset of m of n pictures is n / m − 1 times that of the whole, beside that of 100 subsets.

    Args:
        generated, real: float [N, D], [M, D], 2 features or more each.
        subset_size: m at most.

    Returns:
        `kid`; `kid_std` over the subsets, as published; `kid_interval`, 95 %, None where the subsets are the whole;
        `kid_subset_size`.
    """
    size = min(subset_size, len(generated), len(real))
    permutations, generated, real = Permutations(), generated.double(), real.double()
    found = []
    for _ in range(KID_SUBSETS):
        x = generated[permutations.next(len(generated))[:size].to(generated.device)]
        y = real[permutations.next(len(real))[:size].to(real.device)]
        found.append(_unbiased_discrepancy(x, y))
    distances = torch.stack(found).cpu()
    mean, variance = float(distances.mean()), float(distances.var(correction=0))
    smaller = min(len(generated), len(real))
    return {
        "kid": mean,
        "kid_std": variance**0.5,
        "kid_interval": None
        if size == smaller
        else interval(mean, (variance * (size / (smaller - size) + 1 / KID_SUBSETS)) ** 0.5),
        "kid_subset_size": size,
    }


def _unbiased_discrepancy(x: Tensor, y: Tensor) -> Tensor:
    """Of as many x as y, [m, D] each; a scalar."""
    m, width = x.shape
    within = [(z @ z.T / width + 1) ** 3 for z in (x, y)]
    inside = torch.stack([kernel.sum() - kernel.diagonal().sum() for kernel in within]).sum()
    between = ((x @ y.T / width + 1) ** 3).sum()
    return inside / (m * (m - 1)) - 2 * between / m**2


def clip_maximum_mean_discrepancy(generated: Tensor, real: Tensor) -> dict[str, object]:
    """1000 times the squared discrepancy of normalised CLIP embeddings with the kernel exp(−|x − y|² / 200).

    Source: Jayasumana et al. 2024, arXiv:2401.09603, section 4. Each set's pairs include those of a picture with
    itself, as published; comparable numbers take CLIP ViT-L/14 of 336 pixels.

    Args:
        generated, real: float [N, D], [M, D], of any length.

    Returns:
        `cmmd`, at least 0 but for rounding.
    """
    x, y = F.normalize(generated.double(), dim=-1), F.normalize(real.double(), dim=-1)
    discrepancy = _mean_kernel(x, x) + _mean_kernel(y, y) - 2 * _mean_kernel(x, y)
    return {"cmmd": _CMMD_SCALE * float(discrepancy)}


def _mean_kernel(x: Tensor, y: Tensor) -> Tensor:
    """The mean over all pairs of the kernel less 1, whose digits the 1 would take away."""
    parts = [torch.expm1((part @ y.T - 1) / _CMMD_VARIANCE).sum() for part in torch.split(x, _CHUNK)]
    return torch.stack(parts).sum() / (len(x) * len(y))
