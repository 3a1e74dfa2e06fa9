"""Batches that are on the device before the step that takes them.

On CUDA a thread receives the next batches, prepares them, and copies them from pinned memory on a stream of its own,
while the device computes. The stream of the step waits for the copies; the host does not.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from itertools import chain, islice
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from ldm_cli.data.prefetch import prefetched


class Tensors(Protocol):
    """An item with tensors, such as a batch."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The item with `change` applied to each of its tensors."""


Item = TypeVar("Item", bound=Tensors)


def on_device(
    source: Generator[Item], device: torch.device, prepare: Callable[[Item], Item] = lambda item: item
) -> Generator[Item]:
    """The items of `source`, in order, prepared and with their tensors on the device.

    On CUDA a few items are copied ahead. On other devices no thread is used, and on the CPU nothing is copied.

    Args:
        source: CPU tensors; closed at the end. The calling thread takes the first item, so that processes which
            `source` starts belong to that thread and end with it.
        device: where the consumer computes, on the current stream.
        prepare: work on the host that comes before the copy.
    """
    with closing(source):
        if device.type == "cuda":
            yield from _copied_ahead(source, device, prepare)
        else:
            for item in source:
                yield prepare(item).map(lambda tensor: tensor.to(device, non_blocking=True))


def _copied_ahead(source: Generator[Item], device: torch.device, prepare: Callable[[Item], Item]) -> Generator[Item]:
    first = list(islice(source, 1))
    copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def send(tensor: Tensor) -> Tensor:
        # torch hands out pinned memory again only when the copies from it are done.
        return tensor.pin_memory().to(device, non_blocking=True)

    def sent() -> Generator[tuple[Item, torch.cuda.Event]]:
        torch.cuda.set_stream(copies)  # sets the device of this thread, too, which is GPU 0 at first
        for item in chain(first, source):
            yield prepare(item).map(send), copies.record_event()

    with prefetched(sent(), alone=True) as items:
        for item, copied in items:
            yield _received(item, copied, torch.cuda.current_stream(device))


def _received(item: Item, copied: torch.cuda.Event, stream: torch.cuda.Stream) -> Item:
    """The item for work on `stream`, which waits for the copies."""
    stream.wait_event(copied)

    def used(tensor: Tensor) -> Tensor:
        tensor.record_stream(stream)  # its memory belongs to the stream of the copies
        return tensor

    return item.map(used)
