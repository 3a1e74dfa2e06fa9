"""Worker processes that make items ahead of their consumer and survive a signal to the whole process group.

A batch queue signals every process of a job. The trainer then finishes its step and saves, for which it needs
its workers: so they ignore these signals and end when the trainer closes them, or is gone.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from ldm_cli.errors import WorkerError

_TIMEOUT = 600  # seconds; a worker that delivers nothing for as long hangs
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

Item = TypeVar("Item")


def made_by_workers(dataset: Dataset[Item], numbers: range, num_workers: int, num_ahead: int) -> Generator[Item]:
    """`dataset[n]` for each of `numbers`, in their order.

    Args:
        dataset: made anew in each worker by a fork, where the system has one.
        numbers: which items.
        num_workers: processes.
        num_ahead: items that each worker may be ahead.

    Raises:
        WorkerError: a worker died, or delivers nothing for ten minutes.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=numbers,
        num_workers=min(num_workers, len(numbers)),
        prefetch_factor=num_ahead,
        multiprocessing_context="fork" if sys.platform == "linux" else "spawn",
        worker_init_fn=_prepare_worker,
        timeout=_TIMEOUT,
        generator=torch.Generator(),  # the default would advance the global generator
    )
    with _signals_blocked():  # workers inherit the block, so that no signal finds them unprepared
        iterator = iter(loader)
    try:
        yield from iterator
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        if reason.startswith("Caught"):  # raised by the data set's own code: a fault in it, not of the worker
            raise
        raise WorkerError("a data worker died or hangs", reason, "run again, or set data.num_workers=0") from error


@contextmanager
def _signals_blocked() -> Iterator[None]:
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _prepare_worker(worker: int) -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    torch.set_num_threads(1)
