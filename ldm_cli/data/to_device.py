"""Batches that are on the device before the step that takes them.

On CUDA a thread receives the next batches, prepares them, and copies them from pinned memory on a stream of its own,
while the device computes. The stream of the step waits for the copies; the host does not.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from itertools import accumulate, chain, islice
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from ldm_cli.data.prefetch import prefetched

_ALIGNMENT = 512  # bytes, as torch aligns tensors on CUDA


class Tensors(Protocol):
    """An item with tensors, such as a batch."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The item with `change` applied to each of its tensors, always in the same order."""


Item = TypeVar("Item", bound=Tensors)


def sent_to_device(
    source: Generator[Item],
    device: torch.device,
    prepare: Callable[[Item], Item] = lambda item: item,
    interrupt: Callable[[], None] = lambda: None,
) -> Generator[Item]:
    """The items of `source`, in order, prepared and with their tensors on the device.

    All tensors of an item are sent in one copy; on CUDA a few items are sent ahead. For the CPU there is neither a copy
    nor a thread.

    Args:
        source: CPU tensors; closed at the end. The calling thread takes the first item, so that processes which
            `source` starts belong to that thread and end with it.
        device: where the consumer computes, on the current stream.
        prepare: work on the host that comes before the copy.
        interrupt: called at the end, to end a wait of `source` in another thread.
    """
    with closing(source):
        if device.type == "cuda":
            yield from _sent_ahead(source, device, prepare, interrupt)
        else:
            for item in source:
                prepared = prepare(item)
                yield prepared if device.type == "cpu" else _sent(prepared, device)[0]


def _sent_ahead(
    source: Generator[Item], device: torch.device, prepare: Callable[[Item], Item], interrupt: Callable[[], None]
) -> Generator[Item]:
    first = list(islice(source, 1))
    copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def sent() -> Generator[tuple[Item, Tensor, torch.cuda.Event]]:
        torch.cuda.set_stream(copies)  # sets the device of this thread, too, which is GPU 0 at first
        for item in chain(first, source):
            yield *_sent(prepare(item), device), copies.record_event()

    with prefetched(sent(), alone=True) as items:
        try:
            for item, memory, copied in items:
                stream = torch.cuda.current_stream(device)
                stream.wait_event(copied)
                memory.record_stream(stream)  # it belongs to the other stream, which must not reuse it before
                yield item
        finally:
            interrupt()


def _sent(item: Item, device: torch.device) -> tuple[Item, Tensor]:
    """The item on the device, and the memory there whose parts its tensors are, uint8 [N]."""
    tensors: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    item.map(note)
    *starts, size = accumulate((-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors), initial=0)
    # torch hands out pinned memory again only when the copies from it are done.
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for tensor, start in zip(tensors, starts, strict=True):
        _part(host, start, tensor).copy_(tensor)
    memory = host.to(device, non_blocking=True)
    parts = iter([_part(memory, start, tensor) for tensor, start in zip(tensors, starts, strict=True)])
    return item.map(lambda _: next(parts)), memory


def _part(memory: Tensor, start: int, like: Tensor) -> Tensor:
    return memory[start : start + like.nbytes].view(like.dtype).view(like.shape)
