"""Muon: momentum whose update is made orthogonal, for the hidden matrices and kernels of a network.

Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the update is scaled to the
size of an AdamW update, so that one learning rate serves both: Liu et al. 2025, "Muon is scalable for LLM training",
§2.2 (arXiv:2502.16982).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ldm_cli.training.distributed import Ranks

# Quintic with the steepest slope at 0 that still stays near 1 (Jordan et al.).
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NUM_ITERATIONS = 5
_ADAMW_RMS = 0.4  # root mean square of an update, in learning rates; AdamW's is 0.2 to 0.4 (Liu et al., §2.2)
_EDGES = ("embed", "conv_in", "conv_out", "projection", "quant_conv")


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon is meant for a parameter: matrices and kernels, but not embeddings, and not the first and last
    layers of a model, whose inputs or outputs have coordinates with a meaning of their own."""
    return parameter.ndim >= 2 and not any(edge in name for edge in _EDGES)


def orthogonalized(matrix: Tensor) -> Tensor:
    """The nearest orthogonal matrix, roughly: all but tiny singular values are moved into about [0.7, 1.2].

    Five steps X ← (a + b·XXᵀ + c·(XXᵀ)²)·X. Each multiplies by a polynomial in the first XXᵀ, so they run on that small
    square matrix, and the long side takes part in two products only.

    Args:
        matrix: float32 [rows, columns].

    Returns:
        float32 [rows, columns].
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalized(matrix.T).T
    a, b, c = _COEFFICIENTS
    x = matrix / (torch.linalg.vector_norm(matrix) + 1e-7)
    gram = x @ x.T
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    total = identity
    for _ in range(_NUM_ITERATIONS):
        factor = a * identity + b * gram + c * (gram @ gram)
        total = factor @ total
        gram = factor @ gram @ factor
    result: Tensor = total @ x
    return result


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized; with decoupled weight decay.

    Like torch's fused AdamW it divides gradients by `grad_scale` and leaves everything as it is where `found_inf` is 1,
    both scalar tensors, without waiting for a device. Each rank orthogonalizes its share of the matrices.

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
            directions = [self._direction(parameter, group["momentum"], scale, skip) for parameter in parameters]
            rate = group["lr"] * (1.0 - skip)
            for parameter, update in zip(parameters, self._orthogonalized(directions), strict=True):
                change = update.view(parameter.shape) * (rate * _ADAMW_RMS * max(update.shape) ** 0.5)
                if group["weight_decay"]:
                    parameter.mul_(1.0 - rate * group["weight_decay"])
                parameter.sub_(change)

    def _direction(self, parameter: nn.Parameter, decay: float, scale: Tensor, skip: Tensor) -> Tensor:
        """Advance the running mean of the gradient and look ahead along it: [rows, columns]."""
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        mean = state["momentum"]
        assert parameter.grad is not None
        gradient = parameter.grad / scale
        if skip.device.type != "cpu":
            # where a step is skipped, the mean itself takes the gradient's place: nothing non-finite enters
            gradient = torch.where(skip.bool(), mean, gradient)
        mean.lerp_(gradient, 1.0 - decay)
        return gradient.lerp_(mean, decay).flatten(1)

    def _orthogonalized(self, directions: list[Tensor]) -> list[Tensor]:
        """Each direction orthogonalized, one at a time, so that the ranks' shares do not change a bit."""
        if self._ranks.world_size == 1:
            return [orthogonalized(direction) for direction in directions]
        updates = [torch.zeros_like(direction) for direction in directions]
        by_size = sorted(range(len(directions)), key=lambda index: directions[index].numel())
        for index in by_size[self._ranks.rank :: self._ranks.world_size]:
            updates[index].copy_(orthogonalized(directions[index]))
        self._ranks.sum_in_place(updates)
        return updates
