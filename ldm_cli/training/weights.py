"""The trained weights as one rank holds them: here all of them, as every other rank does.

`shards.Shards` is the other way: each rank holds its part of every parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ldm_cli.training.distributed import Ranks


class Weights:
    """The parameters of some modules, replicated.

    Attributes:
        ranks: who trains together.
        parameters: module → name → what the optimizer steps on this rank.
        is_sharded: whether those are parts of the parameters, so that all ranks must take part in what needs the whole.
    """

    is_sharded = False

    def __init__(self, modules: Mapping[str, nn.Module], ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks()
        self.parameters = {name: dict(module.named_parameters()) for name, module in modules.items()}

    def replicas(self) -> list[nn.Parameter]:
        """The parameters that every rank holds as a whole."""
        return [parameter for module in self.parameters.values() for parameter in module.values()]

    def sum_gradients(self, figures: Tensor) -> None:
        """Add up over the ranks what each of them has found, and `figures` [N] in the same message."""
        self.ranks.sum_in_place([*(p.grad for p in self.replicas() if p.grad is not None), figures])

    def grad_norm(self, module: str) -> Tensor:
        """2-norm of the gradients of a module: scalar, the same on every rank."""
        norm: Tensor = torch.nn.utils.get_total_norm(
            [p.grad for p in self.parameters[module].values() if p.grad is not None]
        )
        return norm

    @contextmanager
    def whole(self) -> Iterator[None]:
        """While it is entered, by all ranks, the modules of rank 0 hold the whole weights, to be looked at."""
        yield

    @contextmanager
    def refilled(self) -> Iterator[None]:
        """While it is entered, the modules wait for the whole weights; on leaving, each rank keeps what it holds."""
        yield

    def as_whole(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """`value`, of the shape of `parameter`, as what it is of the whole: a DTensor where that is a part."""
        return value

    def own(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """This rank's part of `value`, which is whole or a DTensor and belongs to `parameter`."""
        return value
