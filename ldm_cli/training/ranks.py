"""The processes that train together, as everything but their connection sees them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ldm_cli.errors import UsageError

T = TypeVar("T")


class Ranks:
    """The processes that train together; this class itself is one process on its own.

    Attributes:
        rank: number of this process, in [0, world_size).
    """

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} is not in [0, world_size={world_size})")
        self.rank, self.world_size = rank, world_size

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone reports and writes."""
        return self.rank == 0

    def sum_in_place(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks; all of one dtype and device."""

    def begin_sum(self, tensor: Tensor) -> Callable[[], None]:
        """Begin to replace `tensor` by its sum over the ranks; the function returned waits until that is done.

        Raises:
            WorkerError: another rank failed or is gone; so does that function.
        """
        return lambda: None

    def copy_from(self, rank: int, tensor: Tensor) -> None:
        """Replace `tensor` by that of `rank`, bit for bit."""

    def gathered(self, tensor: Tensor) -> Tensor:
        """[B, …] of each rank, all of one shape → [world_size × B, …] in the order of the ranks, without gradient."""
        return tensor

    def contents(self, content: bytes) -> list[bytes]:
        """The bytes that the ranks give here, in their order."""
        return [content]

    def texts(self, text: str) -> list[str]:
        """The texts that the ranks give here, in their order."""
        return [content.decode() for content in self.contents(text.encode())]

    def largest(self, number: int) -> int:
        """The largest of the integers that the ranks give here."""
        return number

    def from_first(self, text: str) -> str:
        """The text that rank 0 gives here."""
        return self.texts(text)[0]

    def wait(self) -> None:
        """Wait until every rank has come here."""
        self.largest(0)

    def device_group(self) -> dist.ProcessGroup:
        """The connection for tensors on the device; for collectives that `complete` starts.

        Raises:
            ValueError: one process has none.
        """
        raise ValueError(f"no process group where world_size={self.world_size}")

    def complete(self, start: Callable[[], dist.Work | None], tensor: Tensor) -> None:
        """Start a collective that writes to `tensor` and wait for it, as long as the other ranks are well.

        Raises:
            WorkerError: one of them failed or is gone.
        """
        start()

    def wait_for(self, event: torch.cuda.Event | None) -> None:
        """Wait until the device has come to an event of `mark`, as long as the other ranks are well.

        A read of a value on CUDA waits, too, but for ever if that value depends on a lost rank.

        Raises:
            WorkerError: one of them failed or is gone.
        """
        if event is not None:
            event.synchronize()

    def watched(self, work: Callable[[dist.ProcessGroup | None], T]) -> T:
        """The result of `work`, whose blocking collectives end when another rank is gone.

        Args:
            work: is given a process group for tensors in the host's memory; None for one process.

        Raises:
            WorkerError: another rank failed or is gone.
        """
        return work(None)

    @contextmanager
    def first_then_others(self) -> Iterator[None]:
        """Rank 0 runs the block before the others enter it, so that they find what it has cached."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()

    def expect_equal(self, facts: dict[str, str]) -> None:
        """Make sure that the ranks agree.

        Args:
            facts: name → value on this rank.

        Raises:
            UsageError: two ranks differ; both values are named.
        """
        given = [json.loads(text) for text in self.texts(json.dumps(facts))]
        for rank, others in enumerate(given):
            for name, value in given[0].items():
                if others.get(name) != value:
                    raise UsageError(
                        f"rank {rank} of {self.world_size} has another {name} than rank 0",
                        f"'{others.get(name)}' instead of '{value}'",
                        "start all ranks with the same command, files and versions",
                    )
