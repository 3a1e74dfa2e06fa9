"""The Inception score."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm_cli.evaluation.subsets import Permutations

NUM_SPLITS = 10


def inception_score(logits: Tensor) -> dict[str, object]:
    """exp of the mean divergence KL(p(y|x) ‖ p(y)), over 10 parts of the shuffled pictures.

    Source: Salimans et al. 2016, arXiv:1606.03498, section 4. The shuffling is that of torch-fidelity.

    Args:
        logits: float [N, C], of 10 pictures or more.

    Returns:
        `inception_score`, the mean over the parts, in [1, C]; `inception_score_std` over the parts.

    Raises:
        ValueError: there are fewer than 10 pictures.
    """
    if len(logits) < NUM_SPLITS:
        raise ValueError(f"inception_score: {len(logits)} pictures, but at least {NUM_SPLITS} are needed")
    shuffled = logits[Permutations().next(len(logits)).to(logits.device)]
    log_p = shuffled.double().log_softmax(1)
    scores = []
    for i in range(NUM_SPLITS):
        part = log_p[i * len(logits) // NUM_SPLITS : (i + 1) * len(logits) // NUM_SPLITS]
        log_mean = part.logsumexp(0) - math.log(len(part))
        divergence = (part.exp() * (part - log_mean)).sum(1)
        scores.append(divergence.mean().exp())
    result = torch.stack(scores)
    return {"inception_score": float(result.mean()), "inception_score_std": float(result.std(correction=0))}
