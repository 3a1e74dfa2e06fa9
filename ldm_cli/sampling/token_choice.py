"""The choice of a token from the logits of a model: temperature, top-k, top-p.

Letters: N rows, K tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm_cli.sampling.config import SamplingConfig


def chosen_tokens(logits: Tensor, uniform: Tensor, config: SamplingConfig) -> Tensor:
    """A token for each row, by the inverse of its distribution function: a function of the row and its random number.

    Args:
        logits: [N, K].
        uniform: [N], in (0, 1).
        config: `temperature` (0: the most probable token), `top_k`, `top_p`.

    Returns:
        int64 [N]; −1 where the row's logits are not finite.
    """
    logits = logits.float()
    is_finite = logits.isfinite().all(-1)
    if config.temperature == 0.0:
        tokens = logits.argmax(-1)
    else:
        logits = logits / config.temperature
        if config.top_k is not None and config.top_k < logits.shape[-1]:
            smallest = logits.topk(config.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < smallest, -torch.inf)
        probabilities = logits.softmax(-1)
        if config.top_p < 1.0:
            probabilities = nucleus(probabilities, config.top_p)
        # In float64 a random number below 1 stays below the sum.
        distribution = probabilities.double().cumsum(-1)
        place = torch.searchsorted(distribution, uniform[:, None].double() * distribution[:, -1:], right=True)
        tokens = place[:, 0].clamp(max=logits.shape[-1] - 1)
    return torch.where(is_finite, tokens, -1)


def nucleus(probabilities: Tensor, share: float) -> Tensor:
    """[N, K] with the smallest set of most probable tokens whose sum is at least `share`, and 0 elsewhere (Holtzman et
    al. 2020, arXiv:1904.09751, eq. 3)."""
    ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.double().cumsum(-1) - ordered
    return torch.zeros_like(probabilities).scatter(-1, tokens, ordered.masked_fill(before >= share, 0.0))
