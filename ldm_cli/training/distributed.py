"""The connection among the ranks of one job: how they find one another, exchange tensors, and notice a lost rank.

Rank, world size and address come from the environment, under torchrun's names (`RANK`, `LOCAL_RANK`, `WORLD_SIZE`,
`MASTER_ADDR`, `MASTER_PORT`). Decisions of the host go through gloo; gradients on CUDA go through NCCL. No rank waits
for a lost one: a process that died closes its connections, and a stopped one no longer renews the time stamp that each
rank writes to the store every second.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # exported without a word

from ldm_cli.errors import LdmError, Preempted, UsageError, WorkerError
from ldm_cli.training.gradient_buckets import in_buckets
from ldm_cli.training.rank_watch import POLL, TELLING, RankWatch, announce
from ldm_cli.training.ranks import Ranks

T = TypeVar("T")

_PATIENCE = timedelta(hours=12)
"""How long ranks wait for one that is slow, as rank 0 is at a save. The rank watch notices one that is lost."""
SECONDS_OF_SILENCE = 60.0
"""The `timeout` of `joined` where no recipe says another."""
_JOINING = timedelta(minutes=5)
_RUN_AGAIN = "run the same command again"


class _ConnectedRanks(Ranks):
    """Several processes, connected through torch.distributed."""

    def __init__(self, rank: int, world_size: int, store: Store, device: torch.device, timeout: float) -> None:
        super().__init__(rank, world_size)
        self._store = store
        self._device = device
        is_cuda = device.type == "cuda"
        self._device_group = dist.new_group(backend="nccl", timeout=_PATIENCE) if is_cuda else None
        self._host_group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self._watch = RankWatch(_own_connection(store), rank, world_size, timeout)
        self._watch.ends_process = is_cuda
        self._watch.start()

    def sum_in_place(self, tensors: Sequence[Tensor]) -> None:
        """In few large messages, all under way at once."""
        pending = []
        for bucket in in_buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            pending.append((bucket, flat, self.begin_sum(flat)))
        for bucket, flat, wait in pending:
            wait()
            for tensor, part in zip(bucket, torch.split(flat, [tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(part.view(tensor.shape))

    def begin_sum(self, tensor: Tensor) -> Callable[[], None]:
        """An all-reduce."""
        with self._others_expected():
            work = dist.all_reduce(tensor, group=self._group(tensor), async_op=True)
        return lambda: self._finish(work, tensor)

    def copy_from(self, rank: int, tensor: Tensor) -> None:
        """A broadcast."""
        self.complete(lambda: dist.broadcast(tensor, src=rank, group=self._group(tensor), async_op=True), tensor)

    def gathered(self, tensor: Tensor) -> Tensor:
        """An all-gather."""
        pieces = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.world_size)]
        own, group = tensor.contiguous(), self._group(tensor)
        self.complete(lambda: dist.all_gather(pieces, own, group=group, async_op=True), tensor)
        return torch.cat(pieces)

    def contents(self, content: bytes) -> list[bytes]:
        """Lengths first, then contents padded to the longest."""
        lengths = self.gathered(torch.tensor([len(content)])).tolist()
        padded = torch.zeros(1, max(1, *lengths), dtype=torch.uint8)
        padded[0, : len(content)] = torch.frombuffer(bytearray(content + b"\0"), dtype=torch.uint8)[:-1]
        rows = self.gathered(padded)
        return [row[:length].numpy().tobytes() for row, length in zip(rows, lengths, strict=True)]

    def largest(self, number: int) -> int:
        """An all-reduce on the host."""
        value = torch.tensor(number)
        self.complete(lambda: dist.all_reduce(value, op=dist.ReduceOp.MAX, async_op=True), value)
        return int(value)

    def device_group(self) -> dist.ProcessGroup:
        """NCCL's for CUDA, else gloo's."""
        group = self._device_group or dist.group.WORLD
        assert group is not None
        return group

    def complete(self, start: Callable[[], dist.Work | None], tensor: Tensor) -> None:
        """For a tensor on CUDA the device waits, not the host."""
        with self._others_expected():
            work = start()
        self._finish(work, tensor)

    def wait_for(self, event: torch.cuda.Event | None) -> None:
        """An event can be asked without waiting."""
        while event is not None and not _within(POLL.total_seconds(), event.query):
            if self._watch.asked() is not None:
                raise self._loss(None)

    def watched(self, work: Callable[[dist.ProcessGroup | None], T]) -> T:
        """In a thread of its own, while this one watches the other ranks."""
        outcome: futures.Future[T] = futures.Future()

        def attempt() -> None:
            try:
                if self._device.type == "cuda":
                    torch.cuda.set_device(self._device)  # a new thread would take the first one
                outcome.set_result(work(self._host_group))
            except BaseException as error:
                outcome.set_exception(error)

        threading.Thread(target=attempt, daemon=True).start()
        while not futures.wait([outcome], POLL.total_seconds()).done:
            if self._watch.asked() is not None:
                raise self._loss(None)
        with self._others_expected():
            return outcome.result()

    def announce(self, error: BaseException) -> None:
        """Leave the reason why this rank ends where the others find it, unless another has failed before."""
        self._watch.is_answered.set()
        if isinstance(error, LdmError):
            reason = error.what + (f": {error.cause}" if error.cause else "")
        else:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if not isinstance(error, Preempted):
            announce(self._store, f"rank {self.rank} of {self.world_size} failed", reason)

    def leave(self) -> None:
        """Close all connections, once every rank is done."""
        self.wait()  # rank 0 may hold the store
        self._watch.end()
        dist.destroy_process_group()

    def _group(self, tensor: Tensor) -> dist.ProcessGroup | None:
        return self._device_group if tensor.is_cuda else None

    def _finish(self, work: dist.Work | None, tensor: Tensor) -> None:
        assert work is not None
        if tensor.is_cuda:
            work.wait()
            return
        while True:
            try:
                work.wait(POLL)
                return
            except RuntimeError as error:
                if work.is_completed():  # not a time-out: the connection broke
                    raise self._loss(error) from error
            if self._watch.asked() is not None:
                raise self._loss(None)

    @contextmanager
    def _others_expected(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise self._loss(error) from error

    def _loss(self, error: RuntimeError | None) -> WorkerError:
        """Who failed first, if it can be known."""
        deadline = time.monotonic() + TELLING
        while time.monotonic() < deadline:
            if self._watch.failure is not None:
                return WorkerError(*self._watch.failure, _RUN_AGAIN)
            time.sleep(0.1)
        reason = "" if error is None else str(error).splitlines()[0]
        return WorkerError("lost another rank", reason.rsplit("] ", 1)[-1].split(". ")[0], _RUN_AGAIN)


def _within(seconds: float, holds: Callable[[], bool]) -> bool:
    """Whether a condition holds within so many seconds."""
    deadline = time.monotonic() + seconds
    while not (done := holds()) and time.monotonic() < deadline:
        time.sleep(0.001)
    return done


def local_rank() -> int:
    """Number of this process among the ranks on its machine."""
    return _environment()[2]


def _environment() -> tuple[int, int, int]:
    """Rank, world size and local rank as the launcher set them; (0, 1, 0) without one.

    Raises:
        UsageError: the variables contradict one another or are no numbers.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return 0, 1, 0
    try:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", rank)))
    except (KeyError, ValueError):
        given = ", ".join(f"{name}={os.environ.get(name, '')}" for name in names)
        raise UsageError("cannot tell this process's rank", given, "set all three, as torchrun does") from None
    if not 0 <= rank < world_size or local < 0:
        raise UsageError("this process's rank is impossible", f"RANK={rank}, WORLD_SIZE={world_size}")
    if "LOCAL_RANK" not in os.environ:  # a pod or a Slurm task may see fewer devices than there are ranks
        local %= torch.cuda.device_count() or world_size
    return rank, world_size, local


@contextmanager
def joined(device: torch.device, timeout: float) -> Iterator[Ranks]:
    """Join the job that the environment describes; without one, the job has one rank.

    Args:
        timeout: seconds without a time stamp after which a rank counts as lost.

    Raises:
        UsageError: the environment is wrong.
        WorkerError: the others do not come.
    """
    rank, world_size, _ = _environment()
    if world_size == 1:
        yield Ranks()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        store = _rendezvous(rank, world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=_PATIENCE)
        ranks = _ConnectedRanks(rank, world_size, store, device, timeout)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise WorkerError(f"rank {rank} of {world_size} cannot join the others", reason, _RUN_AGAIN) from error
    try:
        yield ranks
        ranks.leave()
    except BaseException as error:
        # The connections stay open: to close them waits for a rank that may never answer. The process is to end.
        ranks.announce(error)
        raise


def _rendezvous(rank: int, world_size: int) -> Store:
    """The store at MASTER_ADDR:MASTER_PORT, served by rank 0 unless torchrun's agent or a launcher's socket does."""
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), os.environ.get("MASTER_PORT", "29500")
    if (
        not (port.isascii() and port.isdecimal() and 0 < int(port) < 2**16)
        or not address
        or "/" in address
        or address.count(":") == 1
    ):
        cause = f"MASTER_ADDR={address}, MASTER_PORT={port}"
        raise UsageError("cannot tell where the ranks meet", cause, "give a host name and a number from 1 to 65535")
    listening = os.environ.get("LDM_STORE_FD")
    served_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        address,
        int(port),
        world_size,
        is_master=rank == 0 and not served_by_agent,
        timeout=_JOINING,
        wait_for_workers=False,
        master_listen_fd=int(listening) if rank == 0 and listening else None,
    )
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # an agent's store outlives its workers
    return PrefixStore(f"ldm/{restart}", store)


def _own_connection(store: Store) -> Store:
    """A second client of the store: requests of one client wait for one another."""
    clone: Store = store.clone()  # type: ignore[attr-defined]
    return clone
