"""Muon: momentum whose update is made orthogonal, for the hidden matrices and kernels of a network.

Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the update is scaled to the
size of an AdamW update, so that one learning rate serves both: Liu et al. 2025, "Muon is scalable for LLM training",
§2.2 (arXiv:2502.16982).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ldm_cli.training.ranks import Ranks

# Quintic with the steepest slope at 0 that still stays near 1 (Jordan et al.).
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NUM_ITERATIONS = 5
_ADAMW_RMS = 0.4  # root mean square of an update, in learning rates; AdamW's is 0.2 to 0.4 (Liu et al., §2.2)
_MOST_TOGETHER = 8
_ELEMENTS_TOGETHER = 1 << 22
_SIDE_TO_SHARE = 128  # on two ranks of one CPU core each sharing takes 29 ms instead of 40 at 128, as long at 64
_EDGES = ("embed", "conv_in", "conv_out", "projection", "quant_conv", "lm_head")


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon is meant for a parameter: matrices and kernels, but not embeddings, and not the first and last
    layers of a model, whose inputs or outputs have coordinates with a meaning of their own."""
    return parameter.ndim >= 2 and not any(edge in name for edge in _EDGES)


def orthogonalized(matrices: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The orthogonal matrices nearest to each, roughly: all but tiny singular values are moved into about [0.7, 1.2].

    Five steps X ← (a + b·XXᵀ + c·(XXᵀ)²)·X. Each multiplies by a polynomial in the first XXᵀ, so in float32 they run on
    that small square matrix, and the long side takes part in two products only. Its rounding in bfloat16 would grow
    from step to step: there they run on X itself.

    Args:
        matrices: [rows, columns] each, all with short sides of one length, and of one shape where `dtype` is bfloat16,
            but for being transposed.
        dtype: of the products.

    Returns:
        [rows, columns] each, of the type of the matrix.
    """
    wide = [matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T for matrix in matrices]
    wide = [(x / (torch.linalg.vector_norm(x) + 1e-7)).to(dtype) for x in wide]
    if dtype == torch.float32:
        factors = _newton_schulz(torch.stack([x @ x.T for x in wide]))
        updates = [factor @ x for factor, x in zip(factors, wide, strict=True)]
    else:
        updates = list(_newton_schulz_on_whole(torch.stack(wide)))
    updates = [u if u.shape == m.shape else u.T for u, m in zip(updates, matrices, strict=True)]
    return [u.to(m.dtype) for u, m in zip(updates, matrices, strict=True)]


def _newton_schulz_on_whole(x: Tensor) -> Tensor:
    """Five steps on each X of [N, rows, columns]."""
    a, b, c = _COEFFICIENTS
    for _ in range(_NUM_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _newton_schulz(gram: Tensor) -> Tensor:
    """The polynomial in each XXᵀ by which the steps multiply X, [N, rows, rows] like `gram`."""
    a, b, c = _COEFFICIENTS
    total: Tensor | None = None
    for step in range(_NUM_ITERATIONS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        total = factor if total is None else factor @ total
        if step < _NUM_ITERATIONS - 1:
            gram = factor @ gram @ factor
    assert total is not None
    return total


def _together(matrices: Sequence[Tensor]) -> list[list[int]]:
    """Indexes of the matrices that are orthogonalized together, largest groups first.

    They follow from shapes and device, so that the rounding does not depend on the number of ranks.
    """
    groups: dict[tuple[int, ...], list[list[int]]] = {}
    for index, matrix in enumerate(matrices):
        side = min(matrix.shape)
        alike = groups.setdefault((side, max(matrix.shape)) if matrix.is_cuda else (side,), [[]])
        if len(alike[-1]) >= max(1, min(_MOST_TOGETHER, _ELEMENTS_TOGETHER // side**2)):
            alike.append([])
        alike[-1].append(index)
    flat = [group for alike in groups.values() for group in alike]
    return sorted(flat, key=lambda group: -sum(matrices[i].numel() * min(matrices[i].shape) for i in group))


def _pays_to_share(matrices: Sequence[Tensor]) -> bool:
    """Whether sharing pays: the cost of computing grows with the sides of the matrices, that of sending does not."""
    return sum(m.numel() * min(m.shape) for m in matrices) >= _SIDE_TO_SHARE * sum(m.numel() for m in matrices)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized; with decoupled weight decay.

    Like torch's fused AdamW it divides gradients by `grad_scale` and leaves everything as it is where `found_inf` is 1,
    both scalar tensors, without waiting for a device; `torch.optim.Muon` can do neither, and takes no kernels. Of large
    matrices each rank orthogonalizes its share. On CUDA the products are in bfloat16.

    Args:
        parameters: matrices [rows, columns] and kernels [rows, …], which are read as matrices [rows, the rest].
        lr: learning rate, of the size that AdamW needs.
        weight_decay: decoupled, as AdamW's.
        momentum: decay of the gradient's running mean.
        ranks: the processes that hold the same parameters and gradients.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._ranks = ranks or Ranks()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("Muon.step takes no closure")
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            device = parameters[0].device
            scale = torch.ones((), device=device) if self.grad_scale is None else self.grad_scale
            skip = torch.zeros((), device=device) if self.found_inf is None else self.found_inf
            if device.type == "cpu" and skip.item():
                continue
            directions = self._directions(parameters, group["momentum"], scale, skip)
            updates = self._orthogonalized([direction.flatten(1) for direction in directions])
            rate = group["lr"] * (1.0 - skip)
            torch._foreach_mul_(updates, [_ADAMW_RMS * max(update.shape) ** 0.5 for update in updates])
            torch._foreach_mul_(updates, rate)
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1.0 - rate * group["weight_decay"])
            torch._foreach_sub_(parameters, [u.view(p.shape) for u, p in zip(updates, parameters, strict=True)])

    def _directions(self, parameters: list[nn.Parameter], decay: float, scale: Tensor, skip: Tensor) -> list[Tensor]:
        """Advance the running means of the gradients and look ahead along them."""
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        means: list[Tensor] = [self.state[parameter]["momentum"] for parameter in parameters]
        raw = [parameter.grad for parameter in parameters if parameter.grad is not None]
        gradients = torch._foreach_div(raw, scale)
        if skip.device.type != "cpu":
            # where a step is skipped, the mean itself takes the gradient's place: nothing non-finite enters
            gradients = tuple(torch.where(skip.bool(), m, g) for m, g in zip(means, gradients, strict=True))
        torch._foreach_lerp_(means, gradients, 1.0 - decay)
        torch._foreach_lerp_(gradients, means, decay)
        return list(gradients)

    def _orthogonalized(self, directions: list[Tensor]) -> list[Tensor]:
        """Each direction orthogonalized, [rows, columns]; the ranks share the groups where that pays."""
        groups = _together(directions)
        shared = self._ranks.world_size > 1 and _pays_to_share(directions)
        if shared:
            groups = groups[self._ranks.rank :: self._ranks.world_size]
        updates = [torch.zeros_like(direction) for direction in directions]
        dtype = torch.bfloat16 if directions[0].is_cuda else torch.float32
        for group in groups:
            for index, update in zip(group, orthogonalized([directions[i] for i in group], dtype), strict=True):
                updates[index].copy_(update)
        if shared:
            self._ranks.sum_in_place(updates)
        return updates
