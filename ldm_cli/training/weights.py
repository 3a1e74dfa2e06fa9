"""The parameters of a run on one rank, replicated: every rank holds all of them.

`sharded_weights.ShardedWeights` is the alternative: each rank holds a part of every parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor, nn

from ldm_cli.training.gradient_buckets import GradientBuckets
from ldm_cli.training.ranks import Ranks


class Weights:
    """The parameters of some modules, replicated.

    Attributes:
        ranks: the processes that train together.
        parameters: module → name → the tensor that the optimizer of this rank updates.
        is_sharded: whether those tensors are parts of the parameters, so that gathering them involves all ranks.
    """

    is_sharded = False

    def __init__(self, modules: Mapping[str, nn.Module], ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks()
        self.parameters = {name: dict(module.named_parameters()) for name, module in modules.items()}

    def replicas(self) -> list[nn.Parameter]:
        """The parameters of which every rank holds a full copy."""
        return [parameter for module in self.parameters.values() for parameter in module.values()]

    @cached_property
    def buckets(self) -> GradientBuckets:
        """The sum over the ranks of the gradients of which every rank has its own."""
        return GradientBuckets((p for p in self.replicas() if p.requires_grad), self.ranks)

    def take_local_gradients(self) -> None:
        """Put the gradients of the parts that this rank holds where the optimizer looks for them."""

    def grad_norm(self, module: str) -> Tensor:
        """2-norm of the gradients of a module: scalar, the same on every rank."""
        norm: Tensor = torch.nn.utils.get_total_norm(
            [p.grad for p in self.parameters[module].values() if p.grad is not None]
        )
        return norm

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within, the modules of rank 0 hold their full weights, to be read; all ranks enter."""
        yield

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Within, the modules of every rank accept full weights; at the end each rank keeps its part of them."""
        yield

    def as_distributed(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """`value` of the shape of `parameter` as a DTensor, if this rank holds a part of that parameter."""
        return value

    def local_part(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """This rank's part of `value`, which is a full tensor or a DTensor and belongs to `parameter`."""
        return value
