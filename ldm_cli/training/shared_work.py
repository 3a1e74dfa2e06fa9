"""Work that ranks take turns in: of several items, rank r does the numbers r, r + world_size, and so on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from safetensors.torch import load, save
from torch import Tensor

from ldm_cli.training.ranks import Ranks

T = TypeVar("T")


def in_turns(items: Sequence[T], work: Callable[[T], Tensor], ranks: Ranks) -> list[Tensor]:
    """The result of each item, in order, bit for bit that of one rank, on the CPU of every rank; all ranks call."""
    own = {str(i): work(items[i]) for i in range(ranks.rank, len(items), ranks.world_size)}
    every = merged({name: result.cpu() for name, result in own.items()}, ranks)
    return [every[str(i)] for i in range(len(items))]


def merged(own: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """The tensors of all ranks, by names that no two ranks use; all ranks call.

    Args:
        own: tensors on the CPU.
    """
    if ranks.world_size == 1:
        return dict(own)
    every: dict[str, Tensor] = {}
    for content in ranks.contents(save({name: tensor.contiguous() for name, tensor in own.items()})):
        every |= load(content)
    return every
