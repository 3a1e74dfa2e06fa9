"""How the codebook of a VQ model is learnt: terms of the loss, running means, restarts, the grid of fixed codes.

Letters: B batch, K number of codes, D channels of a code, N vectors, h w size of the grid of indices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_cli.core.models.vq_model import VectorQuantizer

_LEAST = 1e-5
"""Least use of a code, in equal shares, of which a mean is taken."""


def commitment_loss(z: Tensor, codes: Tensor) -> Tensor:
    """Mean of (z − e)² over vectors and their codes, both [B, D, h, w], with gradient for z alone: scalar.

    The last term of van den Oord et al. 2017, arXiv:1711.00937, eq. 3, to be weighted by β. taming-transformers and
    diffusers give β to the other term, `codebook_loss`.
    """
    return F.mse_loss(z, codes.detach())


def codebook_loss(z: Tensor, codes: Tensor) -> Tensor:
    """Mean of (z − e)² as `commitment_loss`, with gradient for the codes alone; the middle term of that equation."""
    return F.mse_loss(codes, z.detach())


def grid_codes(levels: Sequence[int]) -> Tensor:
    """The codes of finite scalar quantization (Mentzer et al. 2023, arXiv:2309.15505): [K, D].

    Channel i of a code has one of L_i values, 1 / ⌊L_i / 2⌋ apart; the first channel changes fastest with the index.
    The nearest of these codes is each channel rounded and clamped by itself. The paper bounds the channels by tanh
    instead, which a VQModel has no layer for.

    Args:
        levels: L_i, at least 2 each.
    """
    axes = [(torch.arange(n) - n // 2) / (n // 2) for n in reversed(levels)]
    return torch.cartesian_prod(*axes).view(-1, len(axes)).flip(1)


def usage(indices: Tensor, num_codes: int) -> Tensor:
    """The share of each code among indices, int64 of any shape in [0, K): float32 [K], with sum 1."""
    flat = indices.flatten()
    shares = torch.zeros(num_codes, device=flat.device)
    return shares.index_add_(0, flat, torch.full_like(flat, 1, dtype=torch.float32)) / flat.numel()


def perplexity(shares: Tensor) -> Tensor:
    """The number of equally used codes that would have the same entropy: shares [K] → scalar in [1, K]."""
    return torch.exp(-torch.xlogy(shares, shares).sum())


class RunningCodebook(nn.Module):
    """A codebook of running means: e_k = m_k / n_k (van den Oord et al. 2017, appendix A.1), with restarts.

    `observe` adds a part of a batch to the buffers. What the parts change is averaged over the parts of all ranks
    (see `RunningStatistics`), so it is linear in the parts; the rest is in `end_step`.

    Attributes:
        cluster_size: n [K], the running use of each code, in equal shares: 1 is 1/K of all vectors.
        embed_avg: m [K, D], the running sum of the vectors nearest to each code, in the same unit.
        candidates: [K, D], the vectors of this step at which codes may start again; 0 between steps.

    Args:
        quantizer: its codes get no gradient any more. It stays a part of the model, not of this module.
        decay: of the running means, γ.
        restart_below: least use of a code, in equal shares, that does not start again.
        is_trained: whether the codes are worth keeping. Otherwise no code counts as used yet, and nearly all start at
            vectors of the first batch.
    """

    cluster_size: Tensor
    embed_avg: Tensor
    candidates: Tensor

    def __init__(self, quantizer: VectorQuantizer, decay: float, restart_below: float, is_trained: bool) -> None:
        super().__init__()
        weight = quantizer.embedding.weight.requires_grad_(False)
        self._quantizer = (quantizer,)  # in a tuple, torch does not take it for a part
        self._decay, self._restart_below = decay, restart_below
        size = torch.full((len(weight),), 1.0 if is_trained else 0.0, device=weight.device)
        self.register_buffer("cluster_size", size)
        self.register_buffer("embed_avg", weight.detach() * size[:, None])
        self.register_buffer("candidates", torch.zeros_like(weight))

    @torch.no_grad()
    def observe(self, z: Tensor, indices: Tensor, candidates: Tensor) -> None:
        """Advance the buffers by a part of a batch.

        Args:
            z: vectors [B, D, h, w], float32.
            indices: of the nearest codes, int64 [B, h, w].
            candidates: [K, D], whose mean over all parts are the vectors at which codes may start again.
        """
        num_codes, flat = len(self.cluster_size), indices.flatten()
        unit = num_codes / flat.numel()
        sums = torch.zeros_like(self.embed_avg).index_add_(0, flat, z.permute(0, 2, 3, 1).flatten(0, 2))
        self.cluster_size.lerp_(usage(indices, num_codes) * num_codes, 1.0 - self._decay)
        self.embed_avg.lerp_(sums * unit, 1.0 - self._decay)
        self.candidates.copy_(candidates)

    @torch.no_grad()
    def end_step(self, kept: Tensor) -> None:
        """Restart dead codes and bring all codes up to date; `kept` is 0 for a skipped step, which changes nothing."""
        dead = (self.cluster_size < self._restart_below) & (kept > 0)
        self.cluster_size.copy_(torch.where(dead, 1.0, self.cluster_size))
        self.embed_avg.copy_(torch.where(dead[:, None], self.candidates, self.embed_avg))
        self.candidates.zero_()
        weight = self._quantizer[0].embedding.weight
        size = self.cluster_size[:, None]
        weight.copy_(torch.where(size > _LEAST, self.embed_avg / size.clamp(min=_LEAST), weight))

    def num_dead(self) -> Tensor:
        """How many codes are used less than `restart_below`: float32 scalar."""
        return (self.cluster_size < self._restart_below).sum().float()
