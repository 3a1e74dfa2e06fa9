"""Ranks that are real processes, forked from one that has imported everything and connected through gloo."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch._dynamo  # noqa: F401 - the first step of an optimizer imports it, for 1.5 s: here once for all ranks

TIMEOUT = 120.0
"""Seconds that ranks may take on a busy machine; whatever takes longer hangs."""


class ForkedRanks:
    """`work(rank)` in each of `world_size` processes; what it returns is the exit code.

    Args:
        work: what a rank does; an exception is written to its log and is code 1.
        folder: of the logs `rank0.log`, …
    """

    def __init__(self, work: Callable[[int], int], folder: Path, world_size: int = 2) -> None:
        self.logs = [folder / f"rank{rank}.log" for rank in range(world_size)]
        self.pids: list[int] = []
        self.codes: dict[int, int] = {}
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen(world_size)
            for rank in range(world_size):
                shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listening.getsockname()[1])}
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
                if rank == 0:
                    own["LDM_STORE_FD"] = str(listening.fileno())
                if (pid := os.fork()) == 0:
                    self._be(work, rank, shared | own)
                self.pids.append(pid)

    def _be(self, work: Callable[[int], int], rank: int, environment: dict[str, str]) -> None:
        code = 1
        try:
            descriptor = os.open(self.logs[rank], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            for number in (1, 2):
                os.dup2(descriptor, number)
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # not those of a test's capture
            os.environ.update(environment | {"GLOO_SOCKET_IFNAME": "lo"})
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            code = work(rank)
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)

    def send(self, rank: int, number: int) -> None:
        """A signal to one rank."""
        os.kill(self.pids[rank], number)

    def wait(self, ranks: Sequence[int] | None = None) -> list[int]:
        """Exit codes of the ranks asked for, or all; -N if signal N ended one. What hangs is killed and fails."""
        asked = range(len(self.pids)) if ranks is None else ranks
        deadline = time.monotonic() + TIMEOUT
        while missing := [rank for rank in asked if rank not in self.codes]:
            for rank in missing:
                pid, status = os.waitpid(self.pids[rank], os.WNOHANG)
                if pid:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline:
                self.end()
                raise AssertionError(f"ranks {missing} hang; logs: {self.words()}")
            time.sleep(0.01)
        return [self.codes[rank] for rank in asked]

    def end(self) -> None:
        """Kill what is left, stopped or not."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                os.kill(pid, signal.SIGKILL)
                self.codes[rank] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def words(self) -> list[str]:
        """What each rank said, in order."""
        return [log.read_text(errors="replace") if log.exists() else "" for log in self.logs]

    def __enter__(self) -> ForkedRanks:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
